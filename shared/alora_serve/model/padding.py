"""Rows of the packed row as a rectangle: so many places for each of several slots, for one batched call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor
"""Rows of the packed row: a slice where they are consecutive, else their indices."""


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Rows of slots ``[first, last)``, each slot padded to ``width`` rows.

    Attributes:
        rows: the rows, slot after slot as they were given.
        width: rows a slot in the rectangle.
        gather: the row that each place takes, ``[slots * width]`` (some row, for padding); None: place i is row i.
        scatter: for each of ``rows`` its place, ``[rows]``; None likewise.
    """

    rows: Rows
    first: int
    last: int
    width: int
    gather: Tensor | None
    scatter: Tensor | None

    def take(self, packed: Tensor) -> Tensor:
        """``[total_rows, ...]`` as ``[slots, width, ...]``."""
        chosen = packed[self.rows if self.gather is None else self.gather]
        return chosen.reshape(self.last - self.first, self.width, *packed.shape[1:])

    def give(self, places: Tensor) -> Tensor:
        """``[slots, width, ...]`` as ``[rows, ...]``, without the padding."""
        flat = places.flatten(0, 1)
        return flat if self.scatter is None else flat[self.scatter]


def pad_rows(slots: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> PaddedRows:
    """Arrange rows.

    Args:
        slots: slot numbers, each at most once, with the rows of each, at least one.

    Raises:
        ValueError: a slot comes twice; rows would overwrite each other.
    """
    if len({slot for slot, _ in slots}) < len(slots):
        raise ValueError(f"a slot comes twice in {[slot for slot, _ in slots]}")
    first, last = min(slot for slot, _ in slots), max(slot for slot, _ in slots) + 1
    width = max(len(rows) for _, rows in slots)
    listed = [row for _, rows in slots for row in rows]
    scatter = [(slot - first) * width + place for slot, rows in slots for place in range(len(rows))]
    gather = [listed[0]] * ((last - first) * width)
    for row, place in zip(listed, scatter, strict=True):
        gather[place] = row
    consecutive = listed == list(range(listed[0], listed[0] + len(listed)))
    in_order = scatter == list(range(len(gather)))
    return PaddedRows(
        rows=slice(listed[0], listed[0] + len(listed)) if consecutive else torch.tensor(listed, device=device),
        first=first,
        last=last,
        width=width,
        gather=None if in_order else torch.tensor(gather, device=device),
        scatter=None if in_order else torch.tensor(scatter, device=device),
    )
