"""The base KV resident in this process: who may read which segment, what is shared, what goes first when it is full.

Ownership of a segment's positions::

    [0, published)        named by block hashes in the index; any sequence with those tokens may read them
    [published, used)     promised to one writer; nobody else reads or writes them
    [used, capacity)      free: the next extension of the prefix that ends at ``used`` is appended here

Adapter KV never gets here: it lives in private segments (``sequence.py``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Container
from typing import Final, Protocol

import torch

from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import KVSegment, KVSlice, Prefix
from alora_serve.model.kv_pool import KVPool

MIN_SLACK_TOKENS = 128
"""Room a new segment keeps for the conversation to go on in place, as one slice (besides a quarter of its size)."""

REMEMBERED_BLOCKS: Final = 1 << 15
"""Names of dropped blocks that are kept, some 200 bytes each: KV of two million tokens in blocks of 64."""


class PrefixCacheMetrics(Protocol):
    """Counts hits and evictions; implemented in ``metrics/``."""

    def prefix_lookup(self, hit_tokens: int, dropped_tokens: int, missed_tokens: int) -> None:
        """One look-up: tokens found resident, those of whole blocks that were until they made room, and all others."""

    def prefix_evicted(self, segments: int) -> None:
        """Segments dropped for space."""

    def prefix_bytes(self, size_bytes: int) -> None:
        """Bytes of all resident segments."""

    def prefix_pinned_bytes(self, size_bytes: Callable[[], int]) -> None:
        """Whenever asked, from any thread, ``size_bytes`` tells the bytes of those that have holders."""


class PrefixCache:
    """Index and owner of shared segments. Thread-safe.

    Holders pin a prefix (:meth:`acquire`, :meth:`reserve`) and release it; segments without pins leave in least
    recently used order when the budget is exceeded. Pinned segments never leave, so the budget can be overrun while
    more is in use than fits.
    """

    def __init__(
        self, layout: KVLayout, *, budget_bytes: int, device: torch.device, metrics: PrefixCacheMetrics
    ) -> None:
        self._layout = layout
        self.budget_bytes = budget_bytes
        self._pool = KVPool(layout, budget_bytes, device)
        self._metrics = metrics
        self._lock = threading.Lock()
        self._index: dict[BlockHash, Prefix] = {}
        self._dropped: OrderedDict[BlockHash, None] = OrderedDict()  # the last so many; none that is in the index
        self._names: dict[KVSegment, set[BlockHash]] = {}
        self._size_bytes = 0
        self._pinned_bytes = 0
        self._clock = 0
        metrics.prefix_pinned_bytes(lambda: self.pinned_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments owned here."""
        with self._lock:
            return self._size_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of these that are filled, or promised to a writer: the room that segments keep is left out."""
        with self._lock:
            return sum(segment.used for segment in self._names) * self._layout.bytes_per_token

    @property
    def pinned_bytes(self) -> int:
        """Bytes of those that have holders; what is promised to a writer is among them."""
        return self._pinned_bytes

    def resident(self, names: Collection[BlockHash]) -> set[BlockHash]:
        """Those of ``names`` that can be acquired now."""
        with self._lock:
            return {name for name in names if name in self._index}

    def acquire(self, chain: BlockChain, limit: int) -> Prefix:
        """The longest resident prefix of the chain, cut to ``limit`` positions, pinned until :meth:`release`."""
        with self._lock:
            prefix = self._longest(chain).take(limit)
            known_tokens = _known_blocks(chain, self._index, self._dropped) * chain.block_tokens
            self._pin(prefix)
        dropped_tokens = max(0, min(limit, known_tokens) - prefix.tokens)
        self._metrics.prefix_lookup(prefix.tokens, dropped_tokens, limit - prefix.tokens - dropped_tokens)
        return prefix

    def longer(self, chain: BlockChain, limit: int, than_tokens: int) -> Prefix | None:
        """As :meth:`acquire`, uncounted, if that is longer than ``than_tokens`` by now; else None and no pin."""
        with self._lock:
            prefix = self._longest(chain).take(limit)
            if prefix.tokens <= than_tokens:
                return None
            self._pin(prefix)
            return prefix

    def _longest(self, chain: BlockChain) -> Prefix:
        end = _end_of(chain, self._index)
        return self._index[chain.name_of(end)] if end else Prefix()

    def _pin(self, prefix: Prefix) -> None:
        self._clock += 1
        for part in prefix.slices:
            self._hold(part.segment)

    def _hold(self, segment: KVSegment) -> None:
        if not segment.pins:
            self._pinned_bytes += segment.size_bytes
        segment.pins += 1
        segment.last_use = self._clock

    def _let_go(self, segment: KVSegment) -> None:
        """One holder less. What nobody holds and no name leads to is of no use to anyone."""
        segment.pins -= 1
        if segment.pins:
            return
        self._pinned_bytes -= segment.size_bytes
        if not self._names[segment]:
            self._drop(segment)
            self._metrics.prefix_bytes(self._size_bytes)

    def pin(self, prefix: Prefix) -> None:
        """One more holder of an already pinned prefix."""
        with self._lock:
            self._pin(prefix)

    def release(self, prefix: Prefix) -> None:
        """Give a pinned prefix back."""
        with self._lock:
            for part in prefix.slices:
                self._let_go(part.segment)
            self._evict(0)

    def reserve(self, prefix: Prefix, tokens: int) -> KVSlice:
        """Room for ``tokens`` more positions after ``prefix``, pinned, for the caller alone to write.

        Appended in place where the prefix's last segment has room and nobody has extended it yet; else a new segment.
        """
        with self._lock:
            last = prefix.slices[-1] if prefix.slices else None
            if last is not None and last.segment in self._names:
                segment = last.segment
                if last.offset + last.tokens == segment.used and segment.capacity - segment.used >= tokens:
                    return self._promise(segment, tokens)
            capacity = tokens + max(MIN_SLACK_TOKENS, tokens // 4)
            size_bytes = capacity * self._layout.bytes_per_token
            self._evict(size_bytes)
            segment = self._pool.segment(capacity, prefix.tokens)
            self._names[segment] = set()
            self._size_bytes += segment.size_bytes
            self._metrics.prefix_bytes(self._size_bytes)
            return self._promise(segment, tokens)

    def _promise(self, segment: KVSegment, tokens: int) -> KVSlice:
        promised = KVSlice(segment, segment.used, tokens)
        segment.used += tokens
        self._clock += 1
        self._hold(segment)
        return promised

    def settle(self, promised: KVSlice, written_tokens: int) -> None:
        """End a reservation: keep its first ``written_tokens`` positions, free the rest, drop its pin."""
        with self._lock:
            segment = promised.segment
            if segment.used == promised.offset + promised.tokens:
                segment.used = promised.offset + written_tokens
            self._let_go(segment)
            self._evict(0)

    def publish(self, chain: BlockChain, prefix: Prefix, start: int, end: int) -> None:
        """Let others find the blocks of ``chain`` that end in ``(start, end]``, held by ``prefix`` (which covers them).

        Full blocks are named one by one; when ``end`` falls inside a block, so is that partial tail.
        """
        size = chain.block_tokens
        ends = list(range((start // size + 1) * size, end + 1, size))
        if end % size:
            ends.append(end)
        with self._lock:
            for block_end in ends:
                name = chain.name_of(block_end)
                if name not in self._index:
                    held = prefix.take(block_end)
                    self._index[name] = held
                    self._dropped.pop(name, None)
                    for part in held.slices:
                        self._names[part.segment].add(name)

    def _evict(self, incoming_bytes: int) -> None:
        """Drop unpinned segments until there is room for ``incoming_bytes`` more: least recently used first.

        Room in the budget, and then in one piece of the pool: what lies outside it is memory besides the budget. For
        that those go which adjoin, the least recently used of such.
        """
        if self._size_bytes + incoming_bytes <= self.budget_bytes and self._pool.has_room(incoming_bytes):
            return
        before = len(self._names)
        # Whoever uses a descendant uses its ancestors at the same tick, so on a tie the deeper segment goes first.
        idle = deque(sorted((s for s in self._names if not s.pins), key=lambda s: (s.last_use, -s.start)))
        while idle and self._size_bytes + incoming_bytes > self.budget_bytes:
            self._drop(idle.popleft())
        for segment in self._pool.in_the_way(incoming_bytes, idle):
            self._drop(segment)
        if len(self._names) < before:
            self._metrics.prefix_evicted(before - len(self._names))
            self._metrics.prefix_bytes(self._size_bytes)

    def _drop(self, segment: KVSegment) -> None:
        """Forget a segment, unless it is forgotten, and those to which no name leads then."""
        if segment not in self._names:
            return
        useless = list[KVSegment]()
        for name in self._names.pop(segment):
            self._dropped[name] = None
            # Ancestors outlive many descendants and must not go on listing their names.
            for part in self._index.pop(name).slices:
                if part.segment is not segment:
                    left = self._names[part.segment]
                    left.discard(name)
                    if not left and not part.segment.pins:
                        useless.append(part.segment)
        while len(self._dropped) > REMEMBERED_BLOCKS:
            self._dropped.popitem(last=False)
        self._size_bytes -= segment.size_bytes
        for other in useless:
            self._drop(other)

    def close(self) -> None:
        """End what goes on beside its callers. Idempotent."""
        self._pool.close()

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` if the books do not balance; for tests and idle moments."""
        with self._lock:
            total = sum(segment.size_bytes for segment in self._names)
            if total != self._size_bytes:
                raise RuntimeError(f"prefix cache counts {self._size_bytes} bytes, segments have {total}")
            pinned = sum(segment.size_bytes for segment in self._names if segment.pins)
            if pinned != self._pinned_bytes:
                raise RuntimeError(f"prefix cache counts {self._pinned_bytes} pinned bytes, segments have {pinned}")
            if both := self._index.keys() & self._dropped.keys():
                raise RuntimeError(f"prefix cache counts {len(both)} resident blocks as dropped")
            for name, prefix in self._index.items():
                for part in prefix.slices:
                    if part.segment not in self._names or name not in self._names[part.segment]:
                        raise RuntimeError(f"block {name.hex()[:12]} is named in a segment that is gone")
                    if part.offset + part.tokens > part.segment.used:
                        raise RuntimeError(f"block {name.hex()[:12]} reads beyond what was written")


def _known_blocks(chain: BlockChain, *known: Container[BlockHash]) -> int:
    """How many full blocks the chain has up to the last that is known to any of these."""
    blocks = range(len(chain.full), 0, -1)
    return next((block for block in blocks if any(chain.full[block - 1] in names for names in known)), 0)


def _end_of(chain: BlockChain, index: Container[BlockHash]) -> int:
    """Where the last of the chain's blocks ends that is in the index: full ones, then the tail of the next."""
    blocks = _known_blocks(chain, index)
    start = blocks * chain.block_tokens
    longest = min(chain.block_tokens - 1, len(chain) - start)
    return start + next((count for count in range(longest, 0, -1) if chain.tail(blocks, count) in index), 0)
