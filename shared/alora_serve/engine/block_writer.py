"""Put base KV that was computed here into the store, so that nobody computes it again."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Final

from torch import Tensor

from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.kv.blocks import BlockStore
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.kv.transfer import StoreResult
from alora_serve.model.kv_memory import Prefix

PINNED_SHARE: Final = 0.5
"""Of the prefix cache, how much may be pinned by writes before those that nobody waits for are dropped."""


class _PrefixSource:
    """A prefix as :class:`alora_serve.kv.transfer.KVSource`."""

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix

    def pieces(self, start: int, end: int) -> Iterator[tuple[Tensor, int]]:
        for part, distance in self._prefix.pieces(start, end):
            yield part.segment.data[:, :, :, part.offset : part.offset + part.tokens], distance


@dataclass(frozen=True, slots=True, eq=False)
class _Write:
    """One that waits for a thread or runs, of at most so many tokens. It pins ``prefix``.

    Attributes:
        size_bytes: that it will have stored, as far as that is known.
    """

    running: asyncio.Future[StoreResult]
    prefix: Prefix
    tokens: int
    size_bytes: int


class BlockWriter:
    """Writes blocks from pinned prefixes on the executor's threads; one event loop.

    A write waits for a thread no longer than the store may take for those before it.
    """

    def __init__(self, cache: PrefixCache, blocks: BlockStore, executor: Executor) -> None:
        self._cache = cache
        self._blocks = blocks
        self._executor = executor
        self._writes: dict[asyncio.Future[StoreResult], _Write] = {}  # by what was returned

    def start(
        self,
        chain: BlockChain,
        prefix: Prefix,
        start: int,
        *,
        known: Collection[BlockHash] | None = None,
        asked: bool = True,
        within_quota: bool = True,
        awaited: bool = True,
    ) -> asyncio.Future[StoreResult]:
        """Store the blocks of ``chain`` that hold positions from ``start`` to the end of ``prefix``, and its tail.

        Takes over the caller's pin on ``prefix``. Drops, never raises, when the store is slow, full or away. Goes on
        also when whoever waits for it is cancelled.

        Args:
            known: when given, every block from position 0 is made sure of: those not in ``known`` that the store lacks
                are written too, from memory.
            asked: the store was asked for what comes from ``start`` on; False: what it has of that is left out.
            within_quota: False drops all of it.
            awaited: somebody waits for it, which bounds how many there are, until it is given up. While writes pin more
                of the prefix cache than is good for it, others are dropped, and these while those given up do.
        """
        loop = asyncio.get_running_loop()
        with ExitStack() as held:
            held.callback(self._cache.release, prefix)
            fresh = self._blocks.blocks(_covered(chain, prefix), start)
            if not within_quota or self._pins_too_much(prefix, awaited=awaited):
                refused = loop.create_future()
                refused.set_result(self._blocks.refuse(fresh, "backlog" if within_quota else "quota"))
                return refused
            ahead = sum(write.tokens for write in self._writes.values())
            latest = monotonic() + self._blocks.timeout_seconds(ahead)
            work = partial(self._write, chain, prefix, start, known, asked, latest)
            # In the caller's context: what the thread logs belongs to its request.
            writing = loop.run_in_executor(self._executor, copy_context().run, work)
            result = asyncio.shield(writing)
            tokens = prefix.tokens - (start if known is None else 0)
            size_bytes = sum(map(self._blocks.size_bytes, fresh)) if asked else 0  # most of it may be there
            self._writes[result] = _Write(writing, prefix, tokens, size_bytes)
            # Only when the thread is done with the memory, whoever gives up waiting.
            writing.add_done_callback(lambda _: self._writes.pop(result))
            release = held.pop_all()
            writing.add_done_callback(lambda _: release.close())
        return result

    def _pins_too_much(self, prefix: Prefix, *, awaited: bool) -> bool:
        counted = [write for result, write in self._writes.items() if result.cancelled() or not awaited]
        pinned = {part.segment for write in counted for part in write.prefix.slices}
        wanted = {part.segment for part in prefix.slices}
        size_bytes = sum(segment.size_bytes for segment in pinned | wanted)
        return bool(pinned) and not wanted <= pinned and size_bytes > PINNED_SHARE * self._cache.budget_bytes

    def so_far(self, writes: Iterable[asyncio.Future[StoreResult]]) -> StoreResult:
        """What writes that were started come to, without waiting; those that still run count as if they succeed."""
        writes = list(writes)
        done = sum((write.result() for write in writes if write.done()), StoreResult())
        pending = sum(self._writes[write].size_bytes for write in writes if not write.done())
        return replace(done, stored_bytes=done.stored_bytes + pending)

    async def drain(self) -> None:
        """Wait for writes under way; for an orderly shutdown."""
        if self._writes:
            await asyncio.wait([write.running for write in self._writes.values()])

    def _write(
        self,
        chain: BlockChain,
        prefix: Prefix,
        start: int,
        known: Collection[BlockHash] | None,
        asked: bool,
        latest: float,
    ) -> StoreResult:
        covered = _covered(chain, prefix)
        fresh = self._blocks.blocks(covered, start)
        if monotonic() > latest:
            return self._blocks.refuse(fresh, "timeout")
        unsure = [] if asked else fresh
        if known is not None:
            earlier = [block for block in self._blocks.blocks(covered, 0) if block.end <= start]
            unsure = [*(block for block in earlier if block.name not in known), *unsure]
        missing = self._blocks.missing(unsure)
        return self._blocks.write([*missing, *fresh] if asked else missing, _PrefixSource(prefix))


def give_up(writes: Iterable[asyncio.Future[StoreResult]]) -> None:
    """Nobody waits for these any more. They go on."""
    for write in writes:
        write.cancel()


def _covered(chain: BlockChain, prefix: Prefix) -> BlockChain:
    return chain.first(prefix.tokens) if prefix.tokens < len(chain) else chain
