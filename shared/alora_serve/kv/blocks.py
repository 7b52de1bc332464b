"""Blocks of KV in and out of a store: keys and records on one side, slices of memory on the other.

The only place where tensors meet stored bytes. A store that fails, is slow, or holds damaged values makes misses here
and nothing worse; what is wrong is deleted.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from time import monotonic

import structlog
import torch

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError
from alora_serve.kv.keys import BlockChain, BlockHash, part_key
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.record import HEADER_BYTES, MissReason, RecordRejected, RecordSpec, check_payload, payload_of, seal
from alora_serve.kv.store import KVStore, Put, StoreKey
from alora_serve.kv.transfer import (
    BlockMetrics,
    DropReason,
    FetchResult,
    KVDestination,
    KVSource,
    StoredBlock,
    StoreResult,
    StoreTiming,
)

# Stored payloads are read-only views that we only copy from.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

_log = structlog.get_logger(__name__)


class BlockStore:
    """Reads and writes blocks. Thread-safe; every method blocks on the store, none raises for it.

    Args:
        store: where values live.
        layout: the model's KV shape.
        block_tokens: tokens a full block.
        timing: deadlines.
        metrics: told of misses and drops.
    """

    def __init__(
        self,
        store: KVStore,
        *,
        layout: KVLayout,
        block_tokens: int,
        timing: StoreTiming,
        metrics: BlockMetrics,
    ) -> None:
        self._store = store
        self._layout = layout
        self._block_tokens = block_tokens
        self._timing = timing
        self._metrics = metrics
        self._groups = layout.layer_groups(block_tokens)

    def blocks(self, chain: BlockChain, start: int) -> list[StoredBlock]:
        """Full blocks and exact tail of a chain that hold positions from ``start`` on."""
        size = self._block_tokens
        listed = [StoredBlock(index * size, size, chain.full[index]) for index in range(start // size, len(chain.full))]
        tail = chain.tail_tokens
        if tail and len(chain) > start:
            index = len(chain.full)
            listed.append(StoredBlock(index * size, tail, chain.tail(index, tail)))
        return listed

    def size_bytes(self, block: StoredBlock) -> int:
        """Of its KV."""
        return block.tokens * self._layout.bytes_per_token

    def fetch(self, chain: BlockChain, destination: KVDestination) -> FetchResult:
        """Fill ``destination`` from its start with as much of the chain as the store has without a gap.

        A chain longer than the destination lends its later blocks: of a block that reaches beyond, the part inside is
        used. Where the exact tail is missing, shorter tails of the same block are tried.
        """
        wanted = [block for block in self.blocks(chain, destination.start) if block.start < destination.end]
        misses: Counter[MissReason] = Counter()
        good = self._read(wanted, destination, misses)
        end, fetched_bytes, present = destination.start, 0, set()
        for block in wanted:
            if block.name not in good:
                break
            end = min(block.end, destination.end)
            fetched_bytes += self.size_bytes(block)
            present.add(block.name)
        if end < destination.end and not misses.keys() & {"timeout", "unavailable"}:
            tail = self._longest_tail(chain, end, destination.end, {block.name for block in wanted}, misses)
            if tail is not None and self._read([tail], destination, misses):
                end = tail.end
                fetched_bytes += self.size_bytes(tail)
                present.add(tail.name)
        for reason, blocks in misses.items():
            self._metrics.store_miss(reason, blocks)
        return FetchResult(
            end, fetched_bytes, {str(reason): blocks for reason, blocks in misses.items()}, frozenset(present)
        )

    def _longest_tail(
        self, chain: BlockChain, start: int, end: int, tried: Collection[BlockHash], misses: Counter[MissReason]
    ) -> StoredBlock | None:
        """The longest stored tail, none of ``tried``, of the block at ``start`` that reaches beyond it.

        At most one batch of look-ups.
        """
        index = start // self._block_tokens
        first = index * self._block_tokens
        longest = min(self._block_tokens - 1, end - first)
        tails = [StoredBlock(first, count, chain.tail(index, count)) for count in range(longest, start - first, -1)]
        candidates = [tail for tail in tails if tail.name not in tried]
        keys = [part_key(block.name, 0) for block in candidates]
        if not keys:
            return None
        try:
            found = self._store.contains_many(keys, timeout_seconds=self._timing.timeout_seconds(0))
        except StoreError as error:
            misses[_miss_reason(error)] += 1
            return None
        return next((block for block, present in zip(candidates, found, strict=True) if present), None)

    def _read(
        self, blocks: Sequence[StoredBlock], destination: KVDestination, misses: Counter[MissReason]
    ) -> set[BlockHash]:
        """Copy what verifies into the destination; returns the names whose every part did."""
        specs = [(block, spec) for block in blocks for spec in self._specs(block)]
        parts_left = Counter({block.name: len(self._groups) for block in blocks})
        rejected: dict[BlockHash, MissReason] = {}
        details: set[str] = set()
        lock = threading.Lock()  # the sink may run on several threads

        def sink(index: int, value: memoryview) -> None:
            block, spec = specs[index]
            try:
                payload = payload_of(spec, value)
                low, high = max(block.start, destination.start), min(block.end, destination.end)
                stored = torch.frombuffer(payload, dtype=getattr(torch, self._layout.dtype)).view(spec.shape)
                destination.write(low, spec.group, stored[:, :, :, low - block.start : high - block.start])
                # After the copy: a value in shared memory may change meanwhile, as where a cut file is extended again
                # with zeros. One that is good afterwards was good while it was copied.
                check_payload(spec, value)
            except RecordRejected as verdict:
                with lock:
                    rejected[block.name] = verdict.reason
                    details.add(str(verdict))
                return
            with lock:
                parts_left[block.name] -= 1

        failure: MissReason = "absent"
        size_bytes = sum(spec.record_bytes for _, spec in specs)
        try:
            self._store.get_many(
                [spec.key for _, spec in specs], sink, timeout_seconds=self._timing.timeout_seconds(size_bytes)
            )
        except StoreError as error:
            failure = _miss_reason(error)
        finally:
            # Whatever went wrong, the memory is given to others next: nothing may arrive there afterwards.
            destination.finish()
        good = {name for name, left in parts_left.items() if not left}
        for block in blocks:
            if block.name not in good:
                misses[rejected.get(block.name, failure)] += 1
        if rejected:
            _log.warning("stored blocks rejected", blocks=len(rejected), details=sorted(details)[:3])
        corrupt = [spec.key for block, spec in specs if rejected.get(block.name) == "corrupt"]
        if corrupt:
            self._delete(corrupt)
        return good

    def _delete(self, keys: Sequence[StoreKey]) -> None:
        try:
            self._store.delete_many(keys, timeout_seconds=self._timing.timeout_seconds(0))
        except StoreError as error:
            _log.warning("rejected block not deleted", error=str(error))

    def timeout_seconds(self, tokens: int) -> float:
        """How long the store may take for the KV of so many tokens."""
        return self._timing.timeout_seconds(tokens * self._layout.bytes_per_token)

    def write(self, blocks: Sequence[StoredBlock], source: KVSource) -> StoreResult:
        """Store blocks, in order, from memory. Those that meet no deadline or no space are dropped and counted."""
        if not blocks:
            return StoreResult()
        end = monotonic() + self.timeout_seconds(sum(block.tokens for block in blocks))
        stored_bytes = 0
        for position, block in enumerate(blocks):
            puts = [
                Put(spec.key, self._record(block, spec, source), evict_first=block.tokens < self._block_tokens)
                for spec in self._specs(block)
            ]
            try:
                self._store.put_many(puts, timeout_seconds=max(0.0, end - monotonic()))
            except StoreError as error:
                reason = _drop_reason(error)
                left = len(blocks) - position
                self._metrics.store_drop(reason, left)
                _log.warning("blocks not stored", reason=reason, blocks=left, error=str(error))
                return StoreResult(stored_bytes, {reason: left})
            stored_bytes += self.size_bytes(block)
        return StoreResult(stored_bytes)

    def refuse(self, blocks: Sequence[StoredBlock], reason: DropReason) -> StoreResult:
        """Count blocks that nobody may store."""
        if not blocks:
            return StoreResult()
        self._metrics.store_drop(reason, len(blocks))
        return StoreResult(0, {reason: len(blocks)})

    def missing(self, blocks: Sequence[StoredBlock]) -> list[StoredBlock]:
        """Those of ``blocks`` that the store lacks; all of them when it cannot say."""
        keys = [part_key(block.name, part) for block in blocks for part in range(len(self._groups))]
        if not keys:
            return []
        try:
            found = self._store.contains_many(keys, timeout_seconds=self._timing.timeout_seconds(0))
        except StoreError:
            return list(blocks)
        parts = len(self._groups)
        return [block for index, block in enumerate(blocks) if not all(found[index * parts : (index + 1) * parts])]

    def _record(self, block: StoredBlock, spec: RecordSpec, source: KVSource) -> bytearray:
        record = bytearray(spec.record_bytes)
        payload = torch.frombuffer(record, dtype=getattr(torch, self._layout.dtype), offset=HEADER_BYTES)
        target = payload.view(spec.shape)
        for piece, distance in source.pieces(block.start, block.end):
            target[:, :, :, distance : distance + piece.shape[3]].copy_(piece[spec.group.start : spec.group.stop])
        seal(spec, record)
        return record

    def _specs(self, block: StoredBlock) -> list[RecordSpec]:
        return [
            RecordSpec(part_key(block.name, part), self._layout, group, block.tokens)
            for part, group in enumerate(self._groups)
        ]


def _miss_reason(error: StoreError) -> MissReason:
    return "timeout" if isinstance(error, StoreTimeoutError) else "unavailable"


def _drop_reason(error: StoreError) -> DropReason:
    if isinstance(error, StoreFullError):
        return "full"
    return "timeout" if isinstance(error, StoreTimeoutError) else "unavailable"
