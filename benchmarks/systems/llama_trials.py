"""Settings of llama-server that may make it faster, for ``try_llama.py``, by how it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from systems.llama_settings import (
    BEST_CASE,
    EIGHT_CLIENTS,
    EIGHT_CLIENTS_BEST,
    FIVE_CLIENTS,
    FIVE_CLIENTS_BEST,
    HALF_PRECISION_KV,
    LlamaSettings,
)

AS_IN_TABLES: Final = "as in the tables"
"""What the others of a list are compared with."""


def _more(settings: LlamaSettings, name: str, *flags: str) -> LlamaSettings:
    return replace(settings, name=name, flags=(*settings.flags, *flags))


def _half(settings: LlamaSettings, name: str, flash_attention: str) -> LlamaSettings:
    return replace(settings, name=name, kv_flags=(*HALF_PRECISION_KV[:-1], flash_attention))


TRIALS: Final[Mapping[str, tuple[LlamaSettings, ...]]] = {
    "serial": (
        replace(BEST_CASE, name=AS_IN_TABLES),
        _more(BEST_CASE, "one thread", "--threads", "1", "--threads-batch", "1"),
        _more(BEST_CASE, "no polling", "--poll", "0"),
        _more(BEST_CASE, "all polling", "--poll", "100"),
        _more(BEST_CASE, "micro-batches of 128", "--ubatch-size", "128"),
        _more(BEST_CASE, "micro-batches of 2,048", "--ubatch-size", "2048"),
        _more(BEST_CASE, "weights not repacked", "--no-repack"),
        _more(BEST_CASE, "flash attention", "--flash-attn", "on"),
        _half(BEST_CASE, "KV in half precision, flash attention", "on"),
        _half(BEST_CASE, "KV in half precision, without", "off"),
    ),
    "five": (
        replace(FIVE_CLIENTS_BEST, name=AS_IN_TABLES),
        replace(FIVE_CLIENTS, name="defaults"),
        _more(FIVE_CLIENTS, "no RAM cache", "--cache-ram", "0"),
        _more(FIVE_CLIENTS, "one KV buffer for all slots", "--kv-unified"),
        replace(FIVE_CLIENTS, name="one slot, RAM cache", slots=1),
        _half(FIVE_CLIENTS_BEST, "as in the tables, KV in half precision", "on"),
    ),
    "eight": (
        replace(EIGHT_CLIENTS_BEST, name=AS_IN_TABLES),
        replace(EIGHT_CLIENTS, name="defaults"),
        _more(EIGHT_CLIENTS, "no RAM cache", "--cache-ram", "0"),
        _more(EIGHT_CLIENTS, "a slot for half of the prompt alike", "--slot-prompt-similarity", "0.5"),
        _more(EIGHT_CLIENTS, "one KV buffer for all slots", "--kv-unified"),
        replace(EIGHT_CLIENTS, name="one slot, RAM cache", slots=1),
        _half(EIGHT_CLIENTS_BEST, "as in the tables, KV in half precision", "on"),
    ),
}
