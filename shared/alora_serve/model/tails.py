"""Private KV of many sequences side by side, so that one call attends to all of it.

A tail is what a sequence computed with its adapter on: short, and never anybody else's. Tails of equal capacity lie in
slots of one arena, ``[layers, 2, slots, kv_heads, capacity, head_dim]``; attention reads a run of slots as a batch and
masks what a sequence has not written. Masked positions are multiplied by an exact zero, which a NaN would survive:
slots are zeroed before they are given out.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import KVSegment

FIRST_TAIL_TOKENS: Final = 64
"""Capacity of the smallest tails. An intrinsic's answer fits."""

ARENA_TOKENS: Final = 1024
"""Slots times capacity of one arena; a longer tail has an arena to itself."""


class TailSegment(KVSegment):
    """One slot of an arena, as the segment of one sequence."""

    __slots__ = ("arena", "slot")

    def __init__(self, arena: TailArena, slot: int, start: int) -> None:
        super().__init__(arena.data[:, :, slot], start)
        self.arena = arena
        self.slot = slot


class TailArena:
    """Slots of equal capacity.

    Attributes:
        data: ``[layers, 2, slots, kv_heads, capacity, head_dim]``; finite everywhere.
        capacity: positions of a slot.
    """

    def __init__(self, layout: KVLayout, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        slots = max(1, ARENA_TOKENS // capacity)
        shape = (layout.layers, 2, slots, layout.kv_heads, capacity, layout.head_dim)
        # Zeroed memory costs nothing until it is touched.
        self.data = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device)
        self._free = list(range(slots))
        self._slots = slots

    @property
    def is_full(self) -> bool:
        """No slot is free."""
        return not self._free

    @property
    def is_empty(self) -> bool:
        """Every slot is free."""
        return len(self._free) == self._slots

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots given out."""
        return self.data[:, :, 0].numel() * self.data.element_size() * (self._slots - len(self._free))

    def take(self, start: int) -> TailSegment:
        """The lowest free slot, as a segment that begins at position ``start``: what runs together lies together.

        Raises:
            IndexError: none is free.
        """
        slot = min(self._free)
        self._free.remove(slot)
        return TailSegment(self, slot, start)

    def give_back(self, segment: TailSegment) -> None:
        """Free the slot of a segment that :meth:`take` gave; nothing of it is left for the next holder."""
        segment.data.zero_()
        self._free.append(segment.slot)

    def layer(self, layer: int, first: int, last: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots ``[first, last)``: views ``[last - first, kv_heads, tokens, head_dim]``."""
        window = self.data[layer, :, first:last, :, :tokens]
        return window[0], window[1]


class TailPool:
    """The arenas of one engine. One thread.

    Args:
        layout: shape of a token's KV.
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._arenas: dict[int, list[TailArena]] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of the segments given out."""
        return sum(arena.used_bytes for arenas in self._arenas.values() for arena in arenas)

    def take(self, tokens: int, start: int) -> TailSegment:
        """A segment for at least ``tokens`` positions from ``start`` on, every one of them zero."""
        capacity = max(FIRST_TAIL_TOKENS, 1 << (tokens - 1).bit_length())
        arenas = self._arenas.setdefault(capacity, [])
        arena = next((arena for arena in arenas if not arena.is_full), None)
        if arena is None:
            # Inference tensors could not be written outside inference mode.
            with torch.inference_mode(mode=False):
                arena = TailArena(self._layout, capacity, self._device)
            arenas.append(arena)
        return arena.take(start)

    def grow(self, segment: TailSegment, used: int, tokens: int) -> TailSegment:
        """A larger segment with the first ``used`` positions of ``segment``, which is given back."""
        larger = self.take(tokens, segment.start)
        larger.data[:, :, :, :used].copy_(segment.data[:, :, :, :used])
        self.give_back(segment)
        return larger

    def give_back(self, segment: TailSegment) -> None:
        """Free a segment. The last arena of a capacity is kept for the next sequence, others are let go when empty."""
        arena = segment.arena
        arena.give_back(segment)
        arenas = self._arenas[arena.capacity]
        if arena.is_empty and (len(arenas) > 1 or arena.capacity > ARENA_TOKENS):
            arenas.remove(arena)
