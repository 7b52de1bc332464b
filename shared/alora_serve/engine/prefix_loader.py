"""Get a prefix's KV into memory: what is resident, then what the store has. What is left, the engine computes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from time import monotonic

from torch import Tensor

from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.kv.blocks import BlockStore, FetchResult
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.model.kv_memory import KVSlice, Prefix


@dataclass(frozen=True, slots=True)
class LoadedPrefix:
    """A pinned prefix and where it came from. The holder releases ``prefix``.

    Attributes:
        fetched_tokens: positions that came from the store for this request.
        present: block names just seen in the store.
    """

    prefix: Prefix
    fetched_tokens: int = 0
    fetched_bytes: int = 0
    seconds: float = 0.0
    misses: Mapping[str, int] = field(default_factory=dict)
    present: frozenset[BlockHash] = frozenset()


@dataclass(frozen=True, slots=True)
class _SliceDestination:
    """A reserved slice as memory for fetched KV; see :class:`alora_serve.kv.blocks.KVDestination`."""

    target: KVSlice

    @property
    def start(self) -> int:
        """First position of the slice."""
        return self.target.start

    @property
    def end(self) -> int:
        """Position after its last."""
        return self.target.end

    def view(self, start: int, end: int) -> Tensor:
        """Positions of the slice, writable."""
        base = self.target.segment.start
        return self.target.segment.data[:, :, :, start - base : end - base]


class PrefixLoader:
    """Loads prefixes for one process; one event loop.

    Args:
        executor: threads for blocking store calls.
    """

    def __init__(self, cache: PrefixCache, blocks: BlockStore, executor: Executor) -> None:
        self._cache = cache
        self._blocks = blocks
        self._executor = executor
        self._flights: dict[BlockHash, asyncio.Task[FetchResult]] = {}

    async def load(self, chain: BlockChain, limit: int) -> LoadedPrefix:
        """The longest prefix of ``chain`` up to ``limit`` positions that memory or the store holds, pinned.

        Concurrent calls for the same prefix fetch it once. Never raises for the store.
        """
        started = monotonic()
        prefix = self._cache.acquire(chain, limit)
        if prefix.tokens >= limit:
            return LoadedPrefix(prefix)
        flight = chain.name_of(limit)
        task = self._flights.get(flight)
        leading = task is None
        if task is None:
            task = asyncio.get_running_loop().create_task(self._fetch(chain, prefix, limit))
            self._flights[flight] = task
            task.add_done_callback(lambda _: self._flights.pop(flight, None))
        try:
            # Shielded: a caller that goes away does not take the fetch from those who share it.
            result = await asyncio.shield(task)
        finally:
            self._cache.release(prefix)
        loaded = self._cache.acquire(chain, limit)
        if not leading:
            return LoadedPrefix(loaded, seconds=monotonic() - started, misses=result.misses, present=result.present)
        return LoadedPrefix(
            loaded,
            fetched_tokens=max(0, result.end - prefix.tokens),
            fetched_bytes=result.fetched_bytes,
            seconds=monotonic() - started,
            misses=result.misses,
            present=result.present,
        )

    async def _fetch(self, chain: BlockChain, prefix: Prefix, limit: int) -> FetchResult:
        """Fetch what follows ``prefix`` into memory reserved for it and publish it."""
        self._cache.pin(prefix)
        promised = self._cache.reserve(prefix, limit - prefix.tokens)
        written = 0
        try:
            result = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._blocks.fetch, chain, _SliceDestination(promised)
            )
            written = result.end - promised.start
            if written:
                fetched = prefix.append(KVSlice(promised.segment, promised.offset, written))
                self._cache.publish(chain, fetched, promised.start, result.end)
            return result
        finally:
            self._cache.settle(promised, written)
            self._cache.release(prefix)
