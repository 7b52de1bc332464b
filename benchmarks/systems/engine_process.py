"""The services' insides without sockets, in a process of its own: the child of ``systems/engine.py``.

Prefiller, decoder and engine on a store in memory, called as the servicers call them, and watched from outside: when
tokens came, and how many bytes of KV are in use.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from systems.answering import answer_lines
from systems.step_timers import StepTimers

from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.engine.core import CoreOptions, ServingCore
from alora_serve.engine.decoder import Decoder
from alora_serve.engine.prefiller import Prefiller
from alora_serve.handles import HandleSigner
from alora_serve.kv.store import KVStore, Put, Sink, StoreKey
from alora_serve.metrics import CoreMetrics, service_registry
from alora_serve.model.device import open_device
from alora_serve.model.loader import load_base_model
from alora_serve.model.weights import WeightQuantization
from alora_serve.types import GenerateRequest, PrefixHandle, Prompt, SamplingParams, TokenChunk


class MemoryStore(KVStore):
    """Keeps nothing: what this process measures is resident."""

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        """Find nothing."""

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        """Nothing is there."""
        return [False] * len(keys)

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        """Drop them."""

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        """There is nothing to delete."""

    def close(self) -> None:
        """There is nothing to close."""


class InProcess:
    """One process's worth of services."""

    def __init__(
        self,
        model: str,
        dtype: str,
        device: str,
        quantization: WeightQuantization,
        roots: Sequence[str],
        adapters: Sequence[str],
    ) -> None:
        base = load_base_model(Path(model), dtype=dtype, device=open_device(device), quantization=quantization)
        self._core = ServingCore(
            base, MemoryStore(), CoreOptions(prefix_cache_bytes=4 << 30), CoreMetrics(service_registry())
        )
        registry = AdapterRegistry(
            [Path(root) for root in roots], base=AdapterHost.of(base), max_resident_bytes=1 << 30
        )
        for adapter in adapters:
            registry.load(adapter)
        signer = HandleSigner([os.urandom(32)], b"", 3600)
        self._prefiller = Prefiller(self._core, signer)
        self._decoder = Decoder(self._core, registry, signer)

    async def warm(self, prefix: Sequence[int]) -> dict[str, float]:
        """Prefill a conversation: tokens computed, and seconds."""
        began = perf_counter()
        result = await self._prefiller.prefill(Prompt(token_ids=tuple(prefix)))
        return {"computed_tokens": result.usage.computed_tokens, "seconds": perf_counter() - began}

    async def fan_out(self, prefix: Sequence[int], adapters: Sequence[str], max_tokens: int) -> dict[str, Any]:
        """All adapters at once on a resident conversation; an empty name is the base model."""
        handle = (await self._prefiller.prefill(Prompt(token_ids=tuple(prefix)))).handle
        began = perf_counter()
        answers = await asyncio.gather(*(self._decode(handle, name, max_tokens, began) for name in adapters))
        return {"answers": answers, "total_seconds": perf_counter() - began}

    async def profile(self, prefix: Sequence[int], adapters: Sequence[str], max_tokens: int) -> dict[str, list[float]]:
        """A fan-out with clocks in it: seconds of each of its decode steps, by kind of work.

        Raises:
            RuntimeError: the sequences never ran all together.
        """
        timers = StepTimers()
        with timers.installed():
            await self.fan_out(prefix, adapters, max_tokens)
        return timers.decode_steps(len(adapters))

    async def profile_prefill(self, prefix: Sequence[int]) -> dict[str, float]:
        """A prefill with clocks in it: its seconds, by kind of work."""
        timers = StepTimers()
        with timers.installed():
            await self.warm(prefix)
        return timers.prefill()

    async def memory(self, prefix: Sequence[int], adapters: Sequence[str], max_tokens: int) -> dict[str, int]:
        """The most bytes of KV that a conversation and its adapters' answers have in use while they decode.

        That is the conversation's resident KV, without the room that its segment keeps for it to go on, and the slots
        of the running sequences, whole. The room, a quarter of the conversation, is the same for 1 adapter and for 16
        and would only make their ratio smaller. Weights, adapters and activations are no KV.
        """
        before, most = self._core.cache.used_bytes, 0

        def look() -> None:
            nonlocal most
            most = max(most, self._core.cache.used_bytes - before + self._core.engine.load.tail_bytes)

        handle = (await self._prefiller.prefill(Prompt(token_ids=tuple(prefix)))).handle
        began = perf_counter()
        await asyncio.gather(*(self._decode(handle, name, max_tokens, began, look) for name in adapters))
        return {"bytes": most, "kv_bytes_per_token": self._core.model_info().kv_bytes_per_token}

    async def _decode(
        self,
        handle: PrefixHandle,
        adapter: str,
        max_tokens: int,
        began: float,
        at_each_token: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        tokens: list[int] = []
        times: list[float] = []
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        async for event in self._decoder.decode(GenerateRequest(handle=handle, adapter=adapter, sampling=sampling)):
            if isinstance(event, TokenChunk):
                tokens += event.token_ids
                times += [perf_counter() - began] * len(event.token_ids)
                at_each_token()
        return {"tokens": tokens, "times": times}


if __name__ == "__main__":
    answer_lines(lambda given: InProcess(**given))
