"""The plan of one forward pass: which rows of the packed row write where and read what. The same for every layer.

What a row sees is a union of disjoint parts: its *own* part, which includes itself (the causal triangle of its span, or
its slot in an arena of tails), and *pieces*, slices of KV that were there before. Every slice is read once however many
sequences hold it, or a part of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.padding import PaddedRows, Rows, pad_rows
from alora_serve.model.tails import TailArena, TailSegment

NARROW_TOKENS: Final = 16
"""Spans up to here attend to their tails in one masked call with others. Longer ones are not worth the padding: of 16
spans of 24 tokens on a prefix of 2,048, one call would save 1 % of what attention takes, and no more at 17 or 64."""

_Masks = dict[tuple[int | None, int, torch.dtype], Tensor]
"""Masks by window, query heads of a key's head, and dtype: layers that have these in common have one."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive new tokens of one sequence in a step.

    Attributes:
        tokens: their ids.
        start: absolute position of the first.
        shared: slices of earlier KV that other sequences may hold too, in order from position 0.
        own: the slice this sequence alone appends to: its earlier tokens after ``shared``, then room for these.
    """

    tokens: tuple[int, ...]
    start: int
    shared: tuple[KVSlice, ...]
    own: KVSlice

    @property
    def destination(self) -> KVSlice:
        """Where the new KV goes."""
        new = len(self.tokens)
        return KVSlice(self.own.segment, self.own.offset + self.own.tokens - new, new)

    @property
    def end(self) -> int:
        """Position after the last of the new tokens."""
        return self.start + len(self.tokens)

    @property
    def is_narrow_tail(self) -> bool:
        """It attends to all of its own KV as one of an arena's slots."""
        return isinstance(self.own.segment, TailSegment) and len(self.tokens) <= NARROW_TOKENS

    @property
    def is_lone(self) -> bool:
        """A single token outside an arena: it attends to its own KV as a slice that holds itself."""
        return len(self.tokens) == 1 and not self.is_narrow_tail

    @property
    def own_history(self) -> tuple[KVSlice, ...]:
        """Its own KV before a causal triangle; at most one slice."""
        before = self.own.tokens - len(self.tokens)
        if self.is_narrow_tail or self.is_lone or not before:
            return ()
        return (KVSlice(self.own.segment, self.own.offset, before),)


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice and the rows that read it.

    Attributes:
        positions: lowest and highest query position among the rows.
        is_first: no row has seen anything before it.
        is_last: no row sees anything after it.
        only_decodes: no sequence has more than one row.
    """

    keys: KVSlice
    rows: Rows
    positions: tuple[int, int]
    is_first: bool
    is_last: bool
    only_decodes: bool
    _masks: _Masks = field(default_factory=dict)

    def mask(self, positions: Tensor, window: int, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores: ``[rows * group, tokens]``, 0 where seen. Made once for all layers.

        Args:
            positions: of all rows of the step.
        """
        key = (window, group, dtype)
        if key not in self._masks:
            keys = torch.arange(self.keys.start, self.keys.end, device=positions.device)
            visible = (positions[self.rows].unsqueeze(1) - keys) < window
            self._masks[key] = _additive(visible.repeat_interleave(group, dim=0), dtype)
        return self._masks[key]

    def forget_masks(self) -> None:
        """Its rows are at other positions now."""
        self._masks.clear()


@dataclass(frozen=True)
class TailBatch:
    """Spans whose own KV lies in one arena, near enough to be attended to in one call.

    Attributes:
        rows: rows of these spans, by slot.
        tokens: positions read of each slot.
        slots: of each row.
        offsets: where in its slot each row's KV goes.
    """

    arena: TailArena
    rows: PaddedRows
    tokens: int
    slots: Tensor
    offsets: Tensor
    _masks: _Masks = field(default_factory=dict)

    def visible(self, window: int | None) -> Tensor:
        """``[slots, width, tokens]``, True where a query sees a position of its slot."""
        queries = self._offset_of_query().unsqueeze(-1)
        keys = torch.arange(self.tokens, device=queries.device)
        seen = keys <= queries
        return seen if window is None else seen & (queries - keys < window)

    def mask(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores: ``[slots, 1, width * group, tokens]``, 0 where seen. Made once for all layers."""
        key = (window, group, dtype)
        if key not in self._masks:
            visible = self.visible(window).repeat_interleave(group, dim=1).unsqueeze(1)
            self._masks[key] = _additive(visible, dtype)
        return self._masks[key]

    def take_over(self, other: TailBatch) -> None:
        """The same slots, one token on: see :meth:`Step.take_over`."""
        self.offsets.copy_(other.offsets)
        self._masks.clear()

    def _offset_of_query(self) -> Tensor:
        """``[slots, width]``: the offset in its slot of each query; of padding, 0, which sees something."""
        rows = self.rows
        if rows.scatter is None:
            return self.offsets.view(-1, rows.width)
        offsets = torch.zeros((rows.last - rows.first) * rows.width, dtype=torch.long, device=self.offsets.device)
        offsets[rows.scatter] = self.offsets
        return offsets.view(-1, rows.width)


class Step:
    """The plan for a packed row of spans.

    Args:
        spans: at least one.
        read_multiple: positions of a tail are read in multiples of it.

    Attributes:
        rows: of each span.
        tails: own parts in arenas.
        causal: indices of spans whose own part is a causal triangle.
        outside: indices of spans whose KV goes elsewhere than to an arena.
        pieces: slices that were there before; those that hold a single token itself come first, so that every row has
            seen something before it meets a slice that others read as well, or that a window may hide.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, read_multiple: int = 1) -> None:
        self.spans = tuple(spans)
        self.rows: list[slice] = []
        first = 0
        for span in self.spans:
            self.rows.append(slice(first, first + len(span.tokens)))
            first += len(span.tokens)
        self.total_rows = first
        self._device = device
        self._read_multiple = read_multiple
        positions = [position for span in self.spans for position in range(span.start, span.end)]
        self.positions = torch.tensor(positions, device=device)
        self.token_ids = torch.tensor([token for span in self.spans for token in span.tokens], device=device)
        self.outside = [index for index, span in enumerate(self.spans) if not span.is_narrow_tail]
        self.causal = [index for index in self.outside if len(self.spans[index].tokens) > 1]
        self.tails = self._tails()
        self.pieces = self._pieces()
        self._causal_masks: dict[tuple[int, int | None, int, torch.dtype], Tensor] = {}

    def causal_mask(self, length: int, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores of a span with itself: ``[length * group, length]``. Made once for all layers."""
        key = (length, window, group, dtype)
        if key not in self._causal_masks:
            place = torch.arange(length, device=self._device)
            distance = place.unsqueeze(1) - place
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._causal_masks[key] = _additive(visible.repeat_interleave(group, dim=0), dtype)
        return self._causal_masks[key]

    def _tails(self) -> list[TailBatch]:
        held: defaultdict[TailArena, dict[int, int]] = defaultdict(dict)
        for index, span in enumerate(self.spans):
            segment = span.own.segment
            if span.is_narrow_tail and isinstance(segment, TailSegment):
                held[segment.arena][index] = segment.slot
        return [
            self._tail_batch(arena, {index: slots[index] for index in run})
            for arena, slots in held.items()
            for run in arena.runs(slots, self._tokens_read(slots, arena))
        ]

    def _tail_batch(self, arena: TailArena, slots: Mapping[int, int]) -> TailBatch:
        """``slots``: by the index of the span that has it."""
        spans = [self.spans[index] for index in slots]
        rows = [range(self.rows[index].start, self.rows[index].stop) for index in slots]
        offsets = [span.destination.offset + place for span in spans for place in range(len(span.tokens))]
        return TailBatch(
            arena=arena,
            rows=pad_rows(list(zip(slots.values(), rows, strict=True)), self._device),
            tokens=self._tokens_read(slots, arena),
            slots=self._tensor([slot for slot, its in zip(slots.values(), rows, strict=True) for _ in its]),
            offsets=self._tensor(offsets),
        )

    def _tokens_read(self, indices: Collection[int], arena: TailArena) -> int:
        """Rounded up: what is not written yet is masked, and the next step reads as many."""
        tokens = max(own.offset + own.tokens for own in (self.spans[index].own for index in indices))
        return min(arena.capacity, -(-tokens // self._read_multiple) * self._read_multiple)

    def take_over(self, other: Step) -> None:
        """Become a step of the same shape over other tokens, in the memory that kernels have been given.

        Args:
            other: one whose spans hold the same slices and slots, and read as many positions of them.
        """
        self.token_ids.copy_(other.token_ids)
        self.positions.copy_(other.positions)
        for mine, its in zip(self.tails, other.tails, strict=True):
            mine.take_over(its)
        for piece in self.pieces:
            piece.forget_masks()

    def _pieces(self) -> list[Piece]:
        # What holds a single token itself has one reader: nobody else may have what is only being written.
        readers = {span.own: [index] for index, span in enumerate(self.spans) if span.is_lone}
        first = len(readers)
        before = [(*span.own_history, *span.shared) for span in self.spans]
        stretches = _stretches({held for slices in before for held in slices})
        for index, slices in enumerate(before):
            for stretch in (stretch for held in slices for stretch in stretches[held]):
                readers.setdefault(stretch, []).append(index)
        left = [set[int]()]
        for indices in reversed(readers.values()):
            left.append(left[-1].union(indices))
        pieces = []
        for order, ((held, indices), after) in enumerate(zip(readers.items(), reversed(left[:-1]), strict=True)):
            spans = [self.spans[index] for index in indices]
            bounds = (min(s.start for s in spans), max(s.end - 1 for s in spans))
            decode = all(len(span.tokens) == 1 for span in spans)
            pieces.append(Piece(held, self._rows_of(indices), bounds, order < first, after.isdisjoint(indices), decode))
        return pieces

    def _rows_of(self, indices: list[int]) -> Rows:
        if all(later == earlier + 1 for earlier, later in pairwise(indices)):
            return slice(self.rows[indices[0]].start, self.rows[indices[-1]].stop)
        return self._tensor([r for index in indices for r in range(self.rows[index].start, self.rows[index].stop)])

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _stretches(slices: Collection[KVSlice]) -> dict[KVSlice, list[KVSlice]]:
    """Each slice as stretches of its memory, cut wherever another one begins or ends, so that no two overlap.

    The conversation that one sequence reads up to its last turn, another reads up to the turn before. Left whole where
    cutting made more stretches than there are slices: a call costs more than the reading that it saves.
    """
    held: defaultdict[KVSegment, list[KVSlice]] = defaultdict(list)
    for each in slices:
        held[each.segment].append(each)
    cut = {}
    for segment, its in held.items():
        edges = sorted({edge for each in its for edge in (each.offset, each.offset + each.tokens)})
        for each in its:
            inside = [edge for edge in edges if each.offset <= edge <= each.offset + each.tokens]
            parts = [KVSlice(segment, low, high - low) for low, high in pairwise(inside)]
            cut[each] = parts if len(edges) <= len(its) + 1 else [each]
    return cut


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``visible``, else ``-inf``."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
