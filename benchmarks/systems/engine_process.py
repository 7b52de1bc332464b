"""The services' insides without sockets, in a process of its own: the child of ``systems/engine.py``.

Prefiller, decoder and engine on a store in memory, called as the servicers call them, and watched from outside: when
tokens came, and how many bytes of tensors are alive.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from systems.answering import answer_lines

from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.modules import module_shapes
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.engine.core import CoreOptions, ServingCore
from alora_serve.engine.decoder import Decoder
from alora_serve.engine.prefiller import Prefiller
from alora_serve.handles import HandleSigner
from alora_serve.kv.store import KVStore, Put, Sink, StoreKey
from alora_serve.metrics import CoreMetrics, service_registry
from alora_serve.model.loader import load_base_model
from alora_serve.types import GenerateRequest, PrefixHandle, Prompt, SamplingParams, TokenChunk


class MemoryStore(KVStore):
    """Keeps nothing: what this process measures is resident, and stored values would count as its memory."""

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

    def __init__(self, model: str, dtype: str, roots: Sequence[str], adapters: Sequence[str]) -> None:
        base = load_base_model(Path(model), dtype=dtype)
        self._core = ServingCore(
            base, MemoryStore(), CoreOptions(prefix_cache_bytes=4 << 30), CoreMetrics(service_registry())
        )
        host = AdapterHost(
            module_shapes=module_shapes(base.module), vocabulary_size=base.vocabulary_size, decode=base.tokenizer.spell
        )
        registry = AdapterRegistry([Path(root) for root in roots], base=host, max_resident_bytes=1 << 30)
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

    async def memory(self, prefix: Sequence[int], adapters: Sequence[str], max_tokens: int) -> dict[str, float]:
        """Bytes of tensors that a conversation and its adapters' answers add, looked at while all of them decode.

        Weights and resident adapters are there before, so they do not count; transient activations that are alive at
        that moment do.
        """
        gc.collect()
        before = self._bytes()
        handle = (await self._prefiller.prefill(Prompt(token_ids=tuple(prefix)))).handle
        began = perf_counter()
        started = [asyncio.Event() for _ in adapters]
        running = [
            asyncio.create_task(self._decode(handle, name, max_tokens, began, event))
            for name, event in zip(adapters, started, strict=True)
        ]
        for event in started:
            await event.wait()
        alive = self._bytes() - before
        await asyncio.gather(*running)
        return {"bytes": alive, "kv_bytes_per_token": self._core.model_info().kv_bytes_per_token}

    def _bytes(self) -> int:
        """Of all tensors and, as their memory comes from one tensor that is there from the start, of resident KV."""
        return _tensor_bytes() + self._core.cache.size_bytes

    async def _decode(
        self, handle: PrefixHandle, adapter: str, max_tokens: int, began: float, started: asyncio.Event | None = None
    ) -> dict[str, Any]:
        tokens: list[int] = []
        times: list[float] = []
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        async for event in self._decoder.decode(GenerateRequest(handle=handle, adapter=adapter, sampling=sampling)):
            if isinstance(event, TokenChunk):
                tokens += event.token_ids
                times += [perf_counter() - began] * len(event.token_ids)
                if started:
                    started.set()
        return {"tokens": tokens, "times": times}


def _tensor_bytes() -> int:
    """Bytes of all tensor memory that Python can reach, each storage once, whoever allocated it."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.layout is torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    answer_lines(lambda given: InProcess(given["model"], given["dtype"], given["roots"], given["adapters"]))
