"""Private KV of many sequences side by side, so that one call attends to all of it.

A tail is what a sequence computed with its adapter on: short, and never anybody else's. Tails of equal capacity lie in
slots of one arena, ``[layers, 2, slots, kv_heads, capacity, head_dim]``; attention reads a run of slots as a batch,
with small gaps between those that it needs, and masks what a sequence has not written. Masked positions are multiplied
by an exact zero, which a NaN would survive: an arena begins as zeros, and what a sequence has written is zeroed when
its slot comes back. On a processor these zeros are pages of the system, which cost nothing before they are written: a
slot for 6,144 tokens, zeroed at once, would hold up a step of all others by more than a tenth of a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Final

import torch
from torch import Tensor

from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import KVSegment
from alora_serve.model.threads import BYTES_PER_SECOND

FIRST_TAIL_TOKENS: Final = 64
"""Capacity of the smallest tails. An intrinsic's answer fits."""

ARENA_SLOTS: Final = 16
"""Most slots of one arena, which are attended to in one call."""

ARENA_BYTES: Final = 2 << 30
"""Most addresses of one arena on a processor, whose memory is taken when it is touched. SmolLM2's in float32 have all
slots up to 2,048 tokens."""

GPU_ARENA_TOKENS: Final = 1024
"""Slots times capacity of one arena on a GPU, where memory is taken as it is allocated."""

KEPT_TOKENS: Final = 2048
"""Slots times capacity of the largest arena that is kept for the next sequence."""


CALL_SECONDS: Final = 60e-6
"""What attending to some of an arena's slots costs besides reading them."""

HEAD_SECONDS: Final = 3e-6
"""What the attention of one head of one slot costs besides reading it."""


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
        data: ``[layers, 2, slots, kv_heads, capacity, head_dim]``; zero where no holder of a slot has written.
        capacity: positions of a slot.
    """

    def __init__(self, layout: KVLayout, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        tokens = ARENA_BYTES // layout.bytes_per_token if device.type == "cpu" else GPU_ARENA_TOKENS
        slots = max(1, min(ARENA_SLOTS, tokens // capacity))
        shape = (layout.layers, 2, slots, layout.kv_heads, capacity, layout.head_dim)
        self.data = _zeros(shape, getattr(torch, layout.dtype), device)
        self._layout = layout
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
    def is_small(self) -> bool:
        """It is worth keeping."""
        return self._slots * self.capacity <= KEPT_TOKENS

    def runs(self, slots: Mapping[int, int], tokens: int) -> list[list[int]]:
        """Whom one call attends to: holders of slots with gaps between them that are sooner read than called.

        Args:
            slots: by number of the holder.
            tokens: positions read of each slot.

        Returns:
            Numbers of holders, in order, by calls.
        """
        by_slot = sorted(slots, key=slots.__getitem__)
        runs = [by_slot[:1]]
        for earlier, later in pairwise(by_slot):
            if self._passes_over(slots[later] - slots[earlier] - 1, tokens):
                runs[-1].append(later)
            else:
                runs.append([later])
        return [sorted(run) for run in runs]

    def _passes_over(self, slots: int, tokens: int) -> bool:
        if self.data.device.type != "cpu":  # an arena is small there, and a call dear
            return True
        layout = self._layout
        seconds = tokens * layout.bytes_per_layer_token / BYTES_PER_SECOND + layout.kv_heads * HEAD_SECONDS
        return slots * seconds < CALL_SECONDS

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
        """Free the slot of a segment that :meth:`take` gave.

        Nothing is left for the next holder of the first ``segment.used`` positions, which are all that may be written.
        """
        segment.data[:, :, :, : segment.used].zero_()
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

    def grow(self, segment: TailSegment, tokens: int) -> TailSegment:
        """A larger segment with the first ``segment.used`` positions of ``segment``, which is given back."""
        larger = self.take(tokens, segment.start)
        larger.used = segment.used
        larger.data[:, :, :, : segment.used].copy_(segment.data[:, :, :, : segment.used])
        self.give_back(segment)
        return larger

    def give_back(self, segment: TailSegment) -> None:
        """Free a segment. The last arena of a small capacity is kept for the next, others are let go when empty."""
        arena = segment.arena
        arena.give_back(segment)
        arenas = self._arenas[arena.capacity]
        if arena.is_empty and not (arena.is_small and len(arenas) == 1):
            arenas.remove(arena)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write them all now.
    memory = mmap(-1, math.prod(shape) * dtype.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
