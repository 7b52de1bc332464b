"""Get a prefix's KV into memory: what is resident, then what the store has. What is left, the engine computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextvars import copy_context
from dataclasses import dataclass, field
from math import ceil
from time import monotonic

from torch import Tensor

from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.kv.blocks import BlockStore
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.kv.transfer import FetchResult
from alora_serve.model.host_copies import HostCopies
from alora_serve.model.kv_memory import KVSlice, Prefix
from alora_serve.telemetry import counts, note, span


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
    """A reserved slice as memory for fetched KV; see :class:`alora_serve.kv.transfer.KVDestination`."""

    target: KVSlice
    copies: HostCopies

    @property
    def start(self) -> int:
        """First position of the slice."""
        return self.target.start

    @property
    def end(self) -> int:
        """Position after its last."""
        return self.target.end

    def write(self, start: int, layers: range, values: Tensor) -> None:
        """Copy into the slice."""
        segment = self.target.segment
        first = start - segment.start
        self.copies.copy(values, segment.data[layers.start : layers.stop, :, :, first : first + values.shape[3]])

    def finish(self) -> None:
        """Wait for copies under way."""
        self.copies.finish()


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What a fetch came to; ``prefix`` is all that is resident now."""

    result: FetchResult
    prefix: Prefix


@dataclass(slots=True, eq=False)
class _Flight:
    """A fetch in progress. It pins what it brings until everyone who waits for it has."""

    task: asyncio.Task[_Fetched]
    waiting: int = 0
    landed: bool = False


class PrefixLoader:
    """Loads prefixes for one process; one event loop.

    Args:
        executor: threads for blocking store calls.
        copies: how fetched values get to where resident KV lies.
        should_fetch: whether to ask the store for so many tokens; see :class:`FetchDecision`.
    """

    def __init__(
        self,
        cache: PrefixCache,
        blocks: BlockStore,
        executor: Executor,
        copies: HostCopies,
        should_fetch: Callable[[int], bool],
    ) -> None:
        self._cache = cache
        self._blocks = blocks
        self._executor = executor
        self._copies = copies
        self._should_fetch = should_fetch
        self._flights: dict[BlockHash, _Flight] = {}

    async def load(self, chain: BlockChain, limit: int) -> LoadedPrefix:
        """The longest prefix of ``chain`` up to ``limit`` positions that memory or the store holds, pinned.

        Concurrent calls for the same prefix fetch it once, and none does where computing it is faster. Never raises for
        the store.
        """
        started = monotonic()
        prefix = self._cache.acquire(chain, limit)
        if prefix.tokens >= limit:
            return LoadedPrefix(prefix)
        name = chain.name_of(limit)
        leading = name not in self._flights
        if leading and not self._should_fetch(limit - prefix.tokens):
            blocks = ceil(limit / chain.block_tokens) - prefix.tokens // chain.block_tokens
            return LoadedPrefix(prefix, misses={"slower": blocks})
        if leading:
            self._flights[name] = self._take_off(name, chain, prefix, limit)
        flight = self._flights[name]
        flight.waiting += 1
        try:
            # Shielded: a caller that goes away does not take the fetch from those who share it.
            fetched = await asyncio.shield(flight.task)
            longer = max(fetched.prefix, prefix, key=lambda held: held.tokens)
            self._cache.pin(longer)
        finally:
            self._cache.release(prefix)
            flight.waiting -= 1
            self._let_go(flight)
        return LoadedPrefix(
            longer,
            fetched_tokens=longer.tokens - prefix.tokens if leading else 0,
            fetched_bytes=fetched.result.fetched_bytes if leading else 0,
            seconds=monotonic() - started,
            misses=fetched.result.misses,
            present=fetched.result.present,
        )

    def _take_off(self, name: BlockHash, chain: BlockChain, prefix: Prefix, limit: int) -> _Flight:
        flight = _Flight(asyncio.get_running_loop().create_task(self._fetch(chain, prefix, limit)))

        def land(_: asyncio.Task[_Fetched]) -> None:
            del self._flights[name]
            flight.landed = True
            self._let_go(flight)

        flight.task.add_done_callback(land)
        return flight

    def _let_go(self, flight: _Flight) -> None:
        """Drop a landed flight's pin once nobody waits for it any more."""
        if flight.landed and not flight.waiting and not flight.task.cancelled() and not flight.task.exception():
            self._cache.release(flight.task.result().prefix)

    async def _fetch(self, chain: BlockChain, prefix: Prefix, limit: int) -> _Fetched:
        """Fetch what follows ``prefix`` into memory reserved for it and publish it; the result's prefix is pinned."""
        self._cache.pin(prefix)
        promised = self._cache.reserve(prefix, limit - prefix.tokens)
        self._copies.begin()
        fetched = prefix
        try:
            result = await self._get(chain, _SliceDestination(promised, self._copies))
            if result.end > promised.start:
                fetched = prefix.append(KVSlice(promised.segment, promised.offset, result.end - promised.start))
                self._cache.publish(chain, fetched, promised.start, result.end)
            self._cache.pin(fetched)
            return _Fetched(result, fetched)
        finally:
            self._cache.settle(promised, fetched.tokens - prefix.tokens)
            self._cache.release(prefix)

    async def _get(self, chain: BlockChain, destination: _SliceDestination) -> FetchResult:
        with span("store get"):
            # In the caller's context: what the thread logs belongs to its request.
            result = await asyncio.get_running_loop().run_in_executor(
                self._executor, copy_context().run, self._blocks.fetch, chain, destination
            )
            note(
                lambda: {
                    "alora.blocks": len(result.present),
                    "alora.bytes.fetched": result.fetched_bytes,
                    **counts("alora.misses", result.misses),
                }
            )
        return result
