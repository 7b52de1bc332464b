"""Weights of adapters of one shape side by side, so that one batched product serves all of them.

Adapters in use are copied into slots, a few milliseconds each; a step whose adapters have slots copies and gathers
nothing. What left the registry may stay in a slot until another adapter takes it: slots are found by digest, never by
name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import frexp
from typing import Final

import torch
from torch import Tensor

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.model.padding import PaddedRows
from alora_serve.model.projections import Projection
from alora_serve.model.threads import BYTES_PER_SECOND, MULTIPLICATIONS_PER_SECOND, ThreadsFor
from alora_serve.types import AdapterDigest

FIRST_SLOTS: Final = 4
"""Slots that a stack begins with where memory is taken as soon as it is allocated."""

PRODUCT_SECONDS: Final = 8e-6
"""What a product of a few rows costs besides reading its weights, with what is done to its operands: 7 to 8 us."""

Shape = tuple[tuple[str, int, float], ...]
"""What adapters must have in common to share a stack: of every adapted module its name, rank and scaling."""


def shape_of(adapter: LoadedAdapter) -> Shape:
    """The stack an adapter belongs to."""
    return tuple(sorted((name, pair.a.shape[0], pair.scaling) for name, pair in adapter.pairs.items()))


@dataclass(slots=True)
class _Member:
    """One adapted module of a projection.

    Attributes:
        columns: its columns of the projection's product.
        ranks: its columns of the intermediate ``A x``.
        scaling: of the product with ``b``.
        b_scaling: of ``b`` itself: a power of two may stand there, as it rounds nothing, and saves a call.
        b: ``[slots, out_features, rank]``.
    """

    name: str
    columns: slice
    ranks: slice
    scaling: float
    b_scaling: float
    b: Tensor


@dataclass(slots=True)
class _Stacked:
    """The stack's weights for one projection. ``a`` is ``[slots, ranks of all members, in_features]``."""

    a: Tensor
    members: list[_Member]

    @property
    def weights(self) -> list[Tensor]:
        """What is multiplied, each ``[slots, ...]``."""
        return [self.a, *(member.b for member in self.members)]


class AdapterStack:
    """Adapters of one shape. One thread.

    Args:
        shape: what they have in common.
        projections: those of the base model that they adapt, each with its adapted modules.
        max_slots: most adapters that can run in one step.
        first_slots: those that there is room for from the beginning, which doubles when they are taken; None: all of
            them on a processor, whose memory is taken when it is touched, and a few on a GPU, where copying is quick.
    """

    def __init__(
        self,
        shape: Shape,
        projections: Sequence[Projection],
        max_slots: int,
        device: torch.device,
        first_slots: int | None = None,
    ) -> None:
        self._max_slots = max_slots
        self._first_slots = first_slots or (max_slots if device.type == "cpu" else FIRST_SLOTS)
        self._slots: dict[AdapterDigest, int] = {}  # least recently used first
        self._capacity = 0
        self._device = device
        ranks = {name: (rank, scaling) for name, rank, scaling in shape}
        self._stacked: dict[Projection, _Stacked] = {}
        for projection in projections:
            members, first = [], 0
            for name, columns in zip(projection.names, projection.columns, strict=True):
                if name in ranks:
                    rank, scaling = ranks[name]
                    empty = self._empty(0, columns.stop - columns.start, rank)
                    exact = abs(frexp(scaling)[0]) == 0.5
                    outer, inner = (1.0, scaling) if exact else (scaling, 1.0)
                    members.append(_Member(name, columns, slice(first, first + rank), outer, inner, empty))
                    first += rank
            if members:
                self._stacked[projection] = _Stacked(self._empty(0, first, projection.in_features), members)

    @property
    def projections(self) -> Collection[Projection]:
        """What its adapters change."""
        return self._stacked.keys()

    def __len__(self) -> int:
        """Adapters that have a slot."""
        return len(self._slots)

    def slot_of(self, digest: AdapterDigest) -> int | None:
        """Where an adapter lies; None where it has no slot."""
        return self._slots.get(digest)

    def passes_over(self, slots: int, width: int) -> bool:
        """Whether products that multiply so many slots for nobody are done sooner than as many again without them.

        On one core, which is where products so small run, however many there are.

        Args:
            width: rows that each slot is multiplied with, padding or not.
        """
        products = [weights for stacked in self._stacked.values() for weights in stacked.weights]
        count = slots * sum(weights.shape[1:].numel() for weights in products)
        seconds = 4 * count / BYTES_PER_SECOND + count * width / MULTIPLICATIONS_PER_SECOND
        return seconds < PRODUCT_SECONDS * len(products)

    def place(self, adapters: Sequence[LoadedAdapter]) -> list[int]:
        """The slots of the adapters of one step, at most ``max_slots`` different ones, after copying in new ones."""
        wanted = {adapter.digest for adapter in adapters}
        for adapter in adapters:
            slot = self._slots.pop(adapter.digest, None)
            if slot is None:
                slot = self._free_slot(wanted)
                self._copy(adapter, slot)
            self._slots[adapter.digest] = slot
        return [self._slots[adapter.digest] for adapter in adapters]

    def _free_slot(self, wanted: Collection[AdapterDigest]) -> int:
        if len(self._slots) < self._capacity:
            taken = {*self._slots.values()}
            return next(slot for slot in range(self._capacity) if slot not in taken)
        if self._capacity < self._max_slots:
            self._grow(min(self._max_slots, max(self._first_slots, 2 * self._capacity)))
            return self._free_slot(wanted)
        oldest = next(digest for digest in self._slots if digest not in wanted)
        return self._slots.pop(oldest)

    def _grow(self, capacity: int) -> None:
        for stacked in self._stacked.values():
            stacked.a = self._grown(stacked.a, capacity)
            for member in stacked.members:
                member.b = self._grown(member.b, capacity)
        self._capacity = capacity

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        grown = self._empty(capacity, *old.shape[1:])
        grown[: old.shape[0]] = old
        return grown

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def _copy(self, adapter: LoadedAdapter, slot: int) -> None:
        for stacked in self._stacked.values():
            for member in stacked.members:
                pair = adapter.pairs[member.name]
                stacked.a[slot, member.ranks] = pair.a
                torch.mul(pair.b.to(self._device), member.b_scaling, out=member.b[slot])

    def add_deltas(self, projection: Projection, rows: PaddedRows, x: Tensor, out: Tensor) -> None:
        """Add ``scaling * B(A(x))`` of each slot's adapter to its rows of ``out``, rounded as PEFT rounds it.

        The input is cast up to float32 and the scaling multiplies B's output (not A's, nor the weights). Plain LoRA in
        PEFT adds out of place in float32 and casts the sum back; aLoRA adds in place into the base dtype, where torch
        also computes the sum in float32 and rounds it once. Casting the delta to bfloat16 before would round twice.

        Args:
            x: the projection's input, ``[total_rows, in_features]``.
            out: its product, ``[total_rows, columns]``; changed in place.
        """
        stacked, slots = self._stacked[projection], slice(rows.first, rows.last)
        inner = _products(rows.take(x).float(), stacked.a[slots])
        for member in stacked.members:
            places = _products(inner[..., member.ranks], member.b[slots])
            if member.scaling != 1.0:
                places.mul_(member.scaling)
            delta, target = rows.give(places), out[:, member.columns]
            if isinstance(rows.rows, slice):
                target[rows.rows].add_(delta)
            else:
                target.index_copy_(0, rows.rows, target[rows.rows].add_(delta))


def _products(x: Tensor, weights: Tensor) -> Tensor:
    """``[slots, rows, in]`` times ``[slots, out, in]``: ``[slots, rows, out]``."""
    count = weights.numel()
    with ThreadsFor(count * weights.element_size(), count * x.shape[1]):
        return torch.bmm(x, weights.transpose(1, 2))
