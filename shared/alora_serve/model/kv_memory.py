"""KV in memory: append-only segments, and prefixes that are chains of slices of them.

A prefix is immutable and may share its segments with others: a longer conversation adds a slice, two conversations
share their system prompt's slice, and a sequence that decodes appends to a slice of its own. Attention reads each slice
once however many sequences hold it (``model/attention.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alora_serve.kv.layout import KVLayout


class KVSegment:
    """Room for the KV of consecutive positions, filled from the front and never rewritten.

    ``used`` counts positions filled or promised to one writer. Whoever moves it holds the lock of the cache that owns
    the segment, or is the only holder of a private one.

    Attributes:
        data: ``[layers, 2, kv_heads, capacity, head_dim]``; positions beyond what a holder was given are garbage.
        start: absolute position of index 0.
        used: indices handed out so far.
        pins: live holders; a pinned segment is not evicted. Owned by the prefix cache.
    """

    __slots__ = ("__weakref__", "data", "last_use", "pins", "start", "used")

    def __init__(self, data: Tensor, start: int) -> None:
        self.data = data
        self.start = start
        self.used = 0
        self.pins = 0
        self.last_use = 0

    @classmethod
    def allocate(cls, layout: KVLayout, capacity: int, start: int, device: torch.device) -> KVSegment:
        """An empty segment. Memory is not touched until it is written."""
        shape = (layout.layers, 2, layout.kv_heads, capacity, layout.head_dim)
        # The engine allocates under inference mode, whose tensors nobody outside it may write: a fetch that goes on in
        # the same segment could not.
        with torch.inference_mode(mode=False):
            return cls(torch.empty(shape, dtype=getattr(torch, layout.dtype), device=device), start)

    @property
    def capacity(self) -> int:
        """Positions it has room for."""
        return self.data.shape[3]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole segment, filled or not."""
        return self.data.numel() * self.data.element_size()


@dataclass(frozen=True, slots=True)
class KVSlice:
    """``tokens`` consecutive positions of a segment from index ``offset``. Equal slices are the same memory."""

    segment: KVSegment
    offset: int
    tokens: int

    @property
    def start(self) -> int:
        """Absolute position of the first token."""
        return self.segment.start + self.offset

    @property
    def end(self) -> int:
        """Absolute position after the last token."""
        return self.start + self.tokens

    def positions(self) -> Tensor:
        """All of it, a view ``[layers, 2, kv_heads, tokens, head_dim]``."""
        return self.segment.data[:, :, :, self.offset : self.offset + self.tokens]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each a view ``[kv_heads, tokens, head_dim]``."""
        window = self.segment.data[layer, :, :, self.offset : self.offset + self.tokens]
        return window[0], window[1]


@dataclass(frozen=True, slots=True)
class Prefix:
    """KV of positions ``[0, tokens)`` as a chain of slices, in order and without gaps."""

    slices: tuple[KVSlice, ...] = ()

    @property
    def tokens(self) -> int:
        """Positions covered."""
        return self.slices[-1].end if self.slices else 0

    def take(self, tokens: int) -> Prefix:
        """The first ``tokens`` positions of it."""
        if tokens >= self.tokens:
            return self
        kept: list[KVSlice] = []
        for part in self.slices:
            if part.start >= tokens:
                break
            kept.append(part if part.end <= tokens else KVSlice(part.segment, part.offset, tokens - part.start))
        return Prefix(tuple(kept))

    def append(self, new: KVSlice) -> Prefix:
        """It, followed by ``new``; one slice where the memory is contiguous.

        Raises:
            ValueError: ``new`` does not start where the prefix ends.
        """
        if new.start != self.tokens:
            raise ValueError(f"slice starts at {new.start}, prefix ends at {self.tokens}")
        if self.slices:
            last = self.slices[-1]
            if last.segment is new.segment:
                return Prefix((*self.slices[:-1], KVSlice(last.segment, last.offset, last.tokens + new.tokens)))
        return Prefix((*self.slices, new))

    def pieces(self, start: int, end: int) -> Iterator[tuple[KVSlice, int]]:
        """The slices that together hold positions ``[start, end)``, each with its distance from ``start``."""
        for part in self.slices:
            low, high = max(start, part.start), min(end, part.end)
            if low < high:
                yield KVSlice(part.segment, low - part.segment.start, high - low), low - start
