"""Ways to run and to ask llama-server, and what makes its arithmetic that of the other systems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

SAME_DTYPE: Final[dict[str, tuple[str, ...]]] = {
    "float32": ("--cache-type-k", "f32", "--cache-type-v", "f32"),
    "bfloat16": ("--cache-type-k", "bf16", "--cache-type-v", "bf16"),
}
"""Flags that keep KV in the dtype of the weights; llama-server's own choice is half precision."""

HALF_PRECISION_KV: Final = ("--cache-type-k", "f16", "--cache-type-v", "f16", "--flash-attn", "on")

WITHOUT_FLASH_ATTENTION: Final = ("--flash-attn", "off")

ALL_LAYERS_ON_GPU: Final = ("--n-gpu-layers", "999")


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """One way to run and to ask llama-server.

    Attributes:
        name: as in tables.
        slots: ``-np``.
        concurrent: a fan-out's questions are asked at once, one after another otherwise.
        pin_slot: a conversation keeps a slot, which every question about it names: concurrent ones queue for its cache.
        base_keeps_cache: the base model is asked as an adapter whose invocation is not there, which llama-server then
            leaves off; asked without one, it would forget the conversation that an adapter was asked about.
        kv_flags: how KV is kept; None for that of :data:`SAME_DTYPE`.
        flags: further flags.
        context_tokens: of each slot.
    """

    name: str
    slots: int = 1
    concurrent: bool = False
    pin_slot: bool = False
    base_keeps_cache: bool = False
    kv_flags: tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()
    context_tokens: int = 8192

    def all_flags(self, dtype: str, device: str = "cpu") -> tuple[str, ...]:
        """What is given to it besides model, adapters, slots and threads."""
        placed = () if device == "cpu" else ALL_LAYERS_ON_GPU
        return (*(_same_dtype(dtype, device) if self.kv_flags is None else self.kv_flags), *placed, *self.flags)


def _same_dtype(dtype: str, device: str) -> tuple[str, ...]:
    # Flash attention would copy a float32 cache to half precision at every layer of every step; with a bfloat16 one it
    # takes a processor 1.3 times as long (docs/adr/0015).
    slow = dtype == "float32" or device == "cpu"
    return (*SAME_DTYPE[dtype], *(WITHOUT_FLASH_ATTENTION if slow else ()))


BEST_CASE: Final = LlamaSettings("llama-server, best case (one slot, serial)", flags=("--cache-ram", "0"))
CACHE_KEPT: Final = replace(
    BEST_CASE, name="llama-server, best found (one slot, serial, base turns keep the cache)", base_keeps_cache=True
)
HALF_KV: Final = LlamaSettings(
    "llama-server, best case, KV in half precision", kv_flags=HALF_PRECISION_KV, flags=("--cache-ram", "0")
)
FIVE_CLIENTS: Final = LlamaSettings("llama-server, five clients (-np 5, defaults)", slots=5, concurrent=True)
FIVE_CLIENTS_BEST: Final = LlamaSettings(
    "llama-server, five clients, best found (a slot a conversation)",
    slots=5,
    concurrent=True,
    pin_slot=True,
    flags=("--cache-ram", "0"),
)
EIGHT_CLIENTS: Final = LlamaSettings("llama-server, eight clients (-np 8, defaults)", slots=8, concurrent=True)
EIGHT_CLIENTS_BEST: Final = replace(
    FIVE_CLIENTS_BEST, name="llama-server, eight clients, best found (a slot a conversation)", slots=8
)
