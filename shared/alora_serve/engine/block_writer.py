"""Put base KV that was computed here into the store, so that nobody computes it again."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from concurrent.futures import Executor
from contextvars import copy_context

from torch import Tensor

from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.kv.blocks import BlockStore
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.kv.transfer import StoreResult
from alora_serve.model.kv_memory import Prefix


class _PrefixSource:
    """A prefix as :class:`alora_serve.kv.transfer.KVSource`."""

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix

    def pieces(self, start: int, end: int) -> Iterator[tuple[Tensor, int]]:
        for part, distance in self._prefix.pieces(start, end):
            yield part.segment.data[:, :, :, part.offset : part.offset + part.tokens], distance


class BlockWriter:
    """Writes blocks from pinned prefixes on the executor's threads; one event loop."""

    def __init__(self, cache: PrefixCache, blocks: BlockStore, executor: Executor) -> None:
        self._cache = cache
        self._blocks = blocks
        self._executor = executor
        self._background: set[asyncio.Task[StoreResult]] = set()

    async def write(
        self,
        chain: BlockChain,
        prefix: Prefix,
        start: int,
        *,
        known: Collection[BlockHash] | None = None,
        within_quota: bool = True,
    ) -> StoreResult:
        """Store the blocks of ``chain`` that hold positions from ``start`` to the end of ``prefix``, and its tail.

        Takes over the caller's pin on ``prefix``. Drops, never raises, when the store is slow, full or away.

        Args:
            known: when given, every block from position 0 is made sure of: those not in ``known`` that the store lacks
                are written too, from memory.
            within_quota: False drops all of it.
        """
        try:
            if not within_quota:
                return self._blocks.refuse(self._blocks.blocks(_covered(chain, prefix), start), "quota")
            # In the caller's context: what the thread logs belongs to its request.
            return await asyncio.get_running_loop().run_in_executor(
                self._executor, copy_context().run, self._write, chain, prefix, start, known
            )
        finally:
            self._cache.release(prefix)

    def start(
        self,
        chain: BlockChain,
        prefix: Prefix,
        start: int,
        *,
        known: Collection[BlockHash] | None = None,
        within_quota: bool = True,
    ) -> asyncio.Task[StoreResult]:
        """As :meth:`write`, beside whatever the caller does meanwhile; goes on also when the caller is cancelled."""
        task = asyncio.get_running_loop().create_task(
            self.write(chain, prefix, start, known=known, within_quota=within_quota)
        )
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def drain(self) -> None:
        """Wait for background writes; for an orderly shutdown."""
        if self._background:
            await asyncio.wait(self._background)

    def _write(self, chain: BlockChain, prefix: Prefix, start: int, known: Collection[BlockHash] | None) -> StoreResult:
        covered = _covered(chain, prefix)
        fresh = self._blocks.blocks(covered, start)
        older = []
        if known is not None:
            earlier = [block for block in self._blocks.blocks(covered, 0) if block.end <= start]
            older = self._blocks.missing([block for block in earlier if block.name not in known])
        return self._blocks.write([*older, *fresh], _PrefixSource(prefix))


def _covered(chain: BlockChain, prefix: Prefix) -> BlockChain:
    return chain.first(prefix.tokens) if prefix.tokens < len(chain) else chain
