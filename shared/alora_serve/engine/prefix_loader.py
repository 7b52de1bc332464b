"""Get a prefix's KV into memory: what is resident, then what the store has. What is left, the engine computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from math import ceil
from threading import Event
from time import monotonic

from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.slice_destination import SliceDestination
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
        seconds: what the request waited.
        own_seconds: of them, for what was fetched for it; the rest for what was on its way to others.
        present: block names just seen in the store.
    """

    prefix: Prefix
    fetched_tokens: int = 0
    fetched_bytes: int = 0
    seconds: float = 0.0
    own_seconds: float = 0.0
    misses: Mapping[str, int] = field(default_factory=dict)
    present: frozenset[BlockHash] = frozenset()

    @property
    def asked(self) -> bool:
        """The store was asked for what follows; not where computing that has been faster."""
        return "slower" not in self.misses


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What a fetch came to; ``prefix`` is all that is resident now."""

    result: FetchResult
    prefix: Prefix


_What = tuple[int, BlockHash]
"""What a fetch asks for: how many positions, and the last block that holds any of them."""


def _what(chain: BlockChain, limit: int) -> _What:
    return limit, chain.name_of(min(len(chain), ceil(limit / chain.block_tokens) * chain.block_tokens))


@dataclass(slots=True, eq=False)
class _Flight:
    """A fetch of positions ``[start, limit)`` in progress. It pins what it brings until all who wait for it have.

    When the last of them has left before its end it is abandoned: nobody joins it, and it ends as soon as it can.
    """

    chain: BlockChain
    start: int
    limit: int
    task: asyncio.Task[_Fetched]
    abandoned: Event
    waiting: int = 0
    landed: bool = False

    @property
    def has_failed(self) -> bool:
        """It came to nothing: by a defect, or because it was cancelled or abandoned. Once it has come to its end."""
        return self.task.cancelled() or self.task.exception() is not None

    def shared_end(self, chain: BlockChain, start: int, limit: int) -> int:
        """Up to where it brings what somebody wants of ``chain`` from ``start`` on; ``start`` where that is too little.

        Enough is a block, or all that either wants: conversations often begin with a few equal tokens, and shall not
        wait for each other.
        """
        end = min(self.chain.common_tokens(chain), self.limit, limit)
        enough = min(start - start % chain.block_tokens + chain.block_tokens, self.limit, limit)
        return end if self.start <= start < end and end >= enough else start

    def is_lacking(self, chain: BlockChain, end: int, result: FetchResult) -> bool:
        """It came to an end at the block of ``chain`` that holds position ``end``: the store did not give it."""
        block = result.end // chain.block_tokens
        is_same = (block + 1) * chain.block_tokens <= self.chain.common_tokens(chain)
        return result.end < self.limit and is_same and end // chain.block_tokens == block


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
        self._flights: dict[_What, _Flight] = {}

    async def load(self, chain: BlockChain, limit: int) -> LoadedPrefix:
        """The longest prefix of ``chain`` up to ``limit`` positions that memory or the store holds, pinned.

        What concurrent calls have in common is fetched once, and nothing where computing it is faster. Never raises for
        the store.
        """
        started = monotonic()
        prefix = self._cache.acquire(chain, limit)
        if prefix.tokens >= limit:
            return LoadedPrefix(prefix)
        with ExitStack() as held:
            held.callback(self._cache.release, prefix)
            loaded = await self._share(chain, limit, prefix, held)
            # What a shared fetch did not find, this one would not find either.
            if loaded.prefix.tokens < limit and not loaded.misses:
                loaded = await self._fetch_rest(chain, limit, loaded, held)
            self._cache.pin(loaded.prefix)
        return replace(loaded, seconds=monotonic() - started)

    async def _share(self, chain: BlockChain, limit: int, prefix: Prefix, held: ExitStack) -> LoadedPrefix:
        """Wait while what comes next is on its way to somebody who wants more or less of the conversation than this.

        Returns:
            What is resident then. With misses where the store lacks what comes next.
        """
        loaded = LoadedPrefix(prefix)
        while loaded.prefix.tokens < limit and _what(chain, limit) not in self._flights:
            start = loaded.prefix.tokens
            ends = {flight: flight.shared_end(chain, start, limit) for flight in self._flights.values()}
            flight = max(ends, key=lambda flight: ends[flight], default=None)
            if flight is None or ends[flight] == start:
                break
            fetched = await self._ride(flight, ends[flight], held)
            if fetched is None:
                break  # its failure is its own
            longest = max(fetched.prefix, loaded.prefix, key=lambda prefix: prefix.tokens)
            # What was computed meanwhile.
            longer = self._cache.longer(chain, limit, longest.tokens)
            if longer is not None:
                held.callback(self._cache.release, longer)
                longest = longer
            lacks = longest.tokens < limit and flight.is_lacking(chain, longest.tokens, fetched.result)
            loaded = LoadedPrefix(
                longest,
                misses=fetched.result.misses if lacks else {},
                present=loaded.present | fetched.result.present,
            )
            if lacks or longest.tokens == start:
                break
        return loaded

    async def _fetch_rest(self, chain: BlockChain, limit: int, shared: LoadedPrefix, held: ExitStack) -> LoadedPrefix:
        """Fetch what follows, or wait for the fetch of just that."""
        prefix, began = shared.prefix, monotonic()
        what = _what(chain, limit)
        leading = what not in self._flights
        if leading and not self._should_fetch(limit - prefix.tokens):
            blocks = ceil(limit / chain.block_tokens) - prefix.tokens // chain.block_tokens
            return replace(shared, misses={"slower": blocks})
        if leading:
            self._flights[what] = self._take_off(what, chain, prefix, limit)
        flight = self._flights[what]
        fetched = await self._ride(flight, limit, held)
        if fetched is None:
            fetched = flight.task.result()  # raises what it failed with
        longer = max(fetched.prefix, prefix, key=lambda held: held.tokens)
        return LoadedPrefix(
            longer,
            fetched_tokens=longer.tokens - prefix.tokens if leading else 0,
            fetched_bytes=fetched.result.fetched_bytes if leading else 0,
            own_seconds=monotonic() - began if leading else 0.0,
            misses=fetched.result.misses,
            present=shared.present | fetched.result.present,
        )

    async def _ride(self, flight: _Flight, tokens: int, held: ExitStack) -> _Fetched | None:
        """Wait for a flight; what it came to, cut to ``tokens`` positions and pinned until ``held`` is left.

        None where it failed.
        """
        flight.waiting += 1
        try:
            # Not for its task itself: a caller that goes away does not take the fetch from those who share it. Nor is
            # the task cancelled when all are gone: its thread may be writing into the memory that it would give back.
            await asyncio.wait((flight.task,))
            if flight.has_failed:
                return None
            fetched = flight.task.result()
            prefix = fetched.prefix.take(tokens)
            self._cache.pin(prefix)
            held.callback(self._cache.release, prefix)
            return replace(fetched, prefix=prefix)
        finally:
            flight.waiting -= 1
            self._let_go(flight)

    def _take_off(self, what: _What, chain: BlockChain, prefix: Prefix, limit: int) -> _Flight:
        abandoned = Event()
        task = asyncio.get_running_loop().create_task(self._fetch(chain, prefix, limit, abandoned))
        flight = _Flight(chain, prefix.tokens, limit, task, abandoned)

        def land(_: asyncio.Task[_Fetched]) -> None:
            self._forget(flight)
            flight.landed = True
            self._let_go(flight)

        task.add_done_callback(land)
        return flight

    def _let_go(self, flight: _Flight) -> None:
        """Once nobody waits for it any more, drop a landed flight's pin, and abandon one that is under way."""
        if flight.waiting:
            return
        if not flight.task.done():
            flight.abandoned.set()
            self._forget(flight)
        elif flight.landed and not flight.has_failed:
            self._cache.release(flight.task.result().prefix)

    def _forget(self, flight: _Flight) -> None:
        """Nobody joins it from now on."""
        what = _what(flight.chain, flight.limit)
        if self._flights.get(what) is flight:
            del self._flights[what]

    async def _fetch(self, chain: BlockChain, prefix: Prefix, limit: int, abandoned: Event) -> _Fetched:
        """Fetch what follows ``prefix`` into memory reserved for it and publish it; the result's prefix is pinned."""
        self._cache.pin(prefix)
        try:
            promised = self._cache.reserve(prefix, limit - prefix.tokens)
            fetched = prefix
            try:
                self._copies.begin()
                result = await self._get(chain, SliceDestination(promised, self._copies, abandoned))
                if result.end > promised.start:
                    fetched = prefix.append(KVSlice(promised.segment, promised.offset, result.end - promised.start))
                    self._cache.publish(chain, fetched, promised.start, result.end)
                self._cache.pin(fetched)
                return _Fetched(result, fetched)
            finally:
                self._cache.settle(promised, fetched.tokens - prefix.tokens)
        finally:
            self._cache.release(prefix)

    async def _get(self, chain: BlockChain, destination: SliceDestination) -> FetchResult:
        with span("store get"):
            # In the caller's context: what the thread logs belongs to its request.
            result = await asyncio.get_running_loop().run_in_executor(
                self._executor, copy_context().run, self._get_here, chain, destination
            )
            note(
                lambda: {
                    "alora.blocks": len(result.present),
                    "alora.bytes.fetched": result.fetched_bytes,
                    **counts("alora.misses", result.misses),
                }
            )
        return result

    def _get_here(self, chain: BlockChain, destination: SliceDestination) -> FetchResult:
        destination.check_wanted()  # it may have waited long for this thread
        return self._blocks.fetch(chain, destination)
