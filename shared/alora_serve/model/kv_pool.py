"""Memory for resident segments: one range of addresses, given out in pieces, touched before it is needed.

The first write to fresh memory costs more than the copy that writes it: on a virtual machine a fetched prefix of 94 MB
took 59 ms into fresh memory and 9 ms into touched one. So pieces are given out from the lowest address, what was let go
of is used again first, and a thread touches what comes next.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from operator import itemgetter
from time import monotonic
from typing import Final

import torch
from torch import Tensor

from alora_serve.errors import ConfigError
from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import KVSegment

AHEAD_PIECES: Final = 2
"""So many times the largest piece so far is kept touched and free: for the next conversation, and one beside it."""

FIRST_PAUSE_SECONDS: Final = 0.5
"""Touching begins so long after a piece was given out: whoever it was given to fills it and answers first."""

PAUSE_SHARE: Final = 4.0
"""Pauses are so many times as long as what is done between them: a fifth of one core's time at most."""

_TOUCH_BYTES: Final = 8 << 20


class Ranges:
    """Free ranges of ``[0, size)``, first fit from below. One thread."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)] if size else []

    @property
    def free(self) -> tuple[tuple[int, int], ...]:
        """``(start, end)`` of each, in order, no two adjoining."""
        return tuple(self._free)

    def copy(self) -> Ranges:
        """The same ranges, apart from these."""
        other = Ranges(0)
        other._free = list(self._free)
        return other

    def has(self, size: int) -> bool:
        """Some free range has that size."""
        return any(end - start >= size for start, end in self._free)

    def take(self, size: int) -> int | None:
        """Start of the lowest free range of that size, which is free no longer; None where there is none."""
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def take_at(self, position: int, size: int) -> tuple[int, int] | None:
        """What is free of the first free range behind ``position``, at most ``size`` of it; None where nothing is."""
        for index, (start, end) in enumerate(self._free):
            if end > position:
                low = max(start, position)
                high = min(end, low + size)
                self._free[index : index + 1] = [(a, b) for a, b in ((start, low), (high, end)) if a < b]
                return low, high
        return None

    def give_back(self, start: int, end: int) -> tuple[int, int]:
        """Free a range that was taken, and tell the free range that it is part of then."""
        index = bisect_left(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
        insort(self._free, (start, end))
        return start, end


class KVPool:
    """Gives out segments. Thread-safe.

    A segment's memory is free again when nobody holds the segment any more: not its view of the pool, but the object.

    Args:
        layout: shape of a token's KV.
        size_bytes: of the range of addresses; pages take memory when first written. What does not fit is allocated
            apart.

    Raises:
        ConfigError: the system does not give so many addresses.
    """

    def __init__(self, layout: KVLayout, size_bytes: int, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        # A GPU's allocator keeps memory by itself, and nothing there is touched by being written.
        self._size_bytes = size_bytes if device.type == "cpu" else 0
        try:
            # Not inference memory, which nobody outside inference mode may write.
            with torch.inference_mode(mode=False):
                self._memory = torch.empty(self._size_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise ConfigError(
                f"prefix_cache_bytes={size_bytes}: the system does not give so much memory ({error}); set it lower"
            ) from error
        self._ranges = Ranges(self._size_bytes)
        self._let_go: deque[tuple[int, int]] = deque()  # appended to by finalizers, which may run anywhere
        self._lock = threading.Lock()
        self._touched_end = 0
        self._largest_bytes = 0
        self._touching = False
        self._toucher: threading.Thread | None = None
        self._closed = threading.Event()

    def close(self) -> None:
        """Touch nothing more. Segments stay what they are. Idempotent."""
        with self._lock:
            self._closed.set()
            toucher = self._toucher
        if toucher is not None:
            toucher.join()

    def has_room(self, size_bytes: int) -> bool:
        """A segment of that size would lie in the pool; also what no pool of this size could hold."""
        if not 0 < size_bytes <= self._size_bytes:
            return True
        with self._lock:
            self._collect()
            return self._ranges.has(size_bytes)

    def in_the_way(self, size_bytes: int, idle: Iterable[KVSegment]) -> list[KVSegment]:
        """Those of ``idle``, the earlier the rather, without which the pool :meth:`has_room`; none if it never has."""
        if self.has_room(size_bytes):
            return []
        with self._lock:
            ranges = self._ranges.copy()
        going: list[tuple[int, KVSegment]] = []
        for segment in idle:
            first = segment.data.data_ptr() - self._memory.data_ptr()
            if not 0 <= first < self._size_bytes:
                continue
            going.append((first, segment))
            low, high = ranges.give_back(first, first + segment.size_bytes)
            if high - low >= size_bytes:
                between = sorted((each for each in going if low <= each[0] < high), key=itemgetter(0))
                return [segment for _, segment in _needed(between, low, high, size_bytes)]
        return []

    def segment(self, capacity: int, start: int) -> KVSegment:
        """An empty segment with room for ``capacity`` positions from ``start`` on. What is in it is garbage."""
        layout = self._layout
        size_bytes = capacity * layout.bytes_per_token
        with self._lock:
            self._collect()
            first = self._ranges.take(size_bytes)
        if first is None:
            return KVSegment.allocate(layout, capacity, start, self._device)
        shape = (layout.layers, 2, layout.kv_heads, capacity, layout.head_dim)
        with torch.inference_mode(mode=False):
            data = self._memory[first : first + size_bytes].view(getattr(torch, layout.dtype)).view(shape)
        segment = KVSegment(data, start)
        weakref.finalize(segment, self._let_go.append, (first, first + size_bytes)).atexit = False
        self._touch_ahead(first + size_bytes, size_bytes)
        return segment

    def _collect(self) -> None:
        while self._let_go:
            self._ranges.give_back(*self._let_go.popleft())

    def _touch_ahead(self, used_end: int, size_bytes: int) -> None:
        """Start to touch what is given out next, if there is not enough of it."""
        with self._lock:
            # Whoever was given untouched memory touches it.
            self._touched_end = max(self._touched_end, used_end)
            self._largest_bytes = max(self._largest_bytes, size_bytes)
            if self._touching or self._closed.is_set() or not self._lacks():
                return
            # No daemon: one that comes back from torch while the interpreter ends would abort the process.
            toucher = threading.Thread(target=self._touch, name="kv-touch")
            with suppress(RuntimeError):  # at the limit of threads memory is touched by whom it is given to
                toucher.start()
                self._toucher, self._touching = toucher, True

    def _lacks(self) -> bool:
        ready = sum(max(0, min(end, self._touched_end) - start) for start, end in self._ranges.free)
        return self._touched_end < self._size_bytes and ready < AHEAD_PIECES * self._largest_bytes

    def _touch(self) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            closed = self._closed.wait(pause_seconds)
            with self._lock:
                # Taken while it is written, so that nobody is given it meanwhile.
                wanted = not closed and self._lacks()
                taken = self._ranges.take_at(self._touched_end, _TOUCH_BYTES) if wanted else None
                if taken is None:
                    self._touching = False
                    return
            began = monotonic()
            _zero(self._memory, *taken)
            pause_seconds = PAUSE_SHARE * (monotonic() - began)
            with self._lock:
                self._ranges.give_back(*taken)
                self._touched_end = max(self._touched_end, taken[1])


def _needed(segments: list[tuple[int, KVSegment]], low: int, high: int, size_bytes: int) -> list[tuple[int, KVSegment]]:
    """Of segments in ``[low, high)``, with where they begin, those that lie in the lowest part that is large enough."""
    while segments and high - (end := segments[0][0] + segments[0][1].size_bytes) >= size_bytes:
        low, segments = end, segments[1:]
    while segments and segments[-1][0] - low >= size_bytes:
        segments = segments[:-1]
    return segments


def _zero(memory: Tensor, start: int, end: int) -> None:
    memory[start:end].zero_()
