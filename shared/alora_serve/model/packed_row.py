"""Attention over a packed row of sequences whose KV lies in shared slices and in arenas of tails.

Each distinct slice is read once a layer: the queries of every sequence that holds it are stacked per KV head, so
grouped-query keys are never expanded. What a query sees is the union of disjoint parts (``model/step.py``), computed
apart and merged by their log-sum-exp:

    w = sigmoid(lse_2 - lse_1),   out = out_1 + (out_2 - out_1) * w,   lse = logaddexp(lse_1, lse_2)

The reference is transformers' ``eager_attention_forward``; soft caps apply to scores before the softmax, and a windowed
layer masks per query. A query that sees nothing of a piece has log-sum-exp ``-inf`` there and takes nothing from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alora_serve.model.attention_kernels import attend
from alora_serve.model.padding import Rows
from alora_serve.model.step import Piece, Step, TailBatch


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """What one layer does to scores."""

    scale: float
    softcap: float | None
    window: int | None


class PackedRow:
    """One layer's attention of the packed row. Answers and log-sum-exps are kept row by row, in float32 until done.

    Args:
        step: who reads and writes what.
        layer: index of the layer.
        query: ``[rows, kv_heads, group, head_dim]``.
        key: ``[rows, kv_heads, head_dim]``.
        value: ``[rows, kv_heads, head_dim]``.
    """

    def __init__(self, step: Step, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules) -> None:
        self._step = step
        self._layer = layer
        self._query = query
        self._key = key
        self._value = value
        self._rules = rules
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def attend(self) -> Tensor:
        """``[rows, kv_heads, group, head_dim]`` in the query's dtype; the row's KV is written on the way."""
        for index in self._step.outside:
            rows = self._step.rows[index]
            keys, values = self._step.spans[index].destination.layer(self._layer)
            keys.copy_(self._key[rows].transpose(0, 1))
            values.copy_(self._value[rows].transpose(0, 1))
        for batch in self._step.tails:
            self._put(batch.rows.rows, *self._tails(batch))
        for index in self._step.causal:
            self._put(self._step.rows[index], *self._causal(self._step.rows[index]))
        for piece in self._step.pieces:
            self._add(piece)
        if self._out is None:
            raise RuntimeError("a step without rows")
        return self._out.to(self._query.dtype)

    def _put(self, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """What rows see first: ``out`` ``[n, kv_heads, group, head_dim]``, ``lse`` ``[n, kv_heads, group]``."""
        if isinstance(rows, slice) and rows.stop - rows.start == self._step.total_rows:
            self._out, self._lse = out, lse
            return
        if self._out is None or self._lse is None:
            shape = (*self._query.shape[:3], self._value.shape[-1])
            self._out = torch.empty(shape, dtype=torch.float32, device=out.device)
            self._lse = torch.empty(shape[:3], dtype=torch.float32, device=out.device)
        self._out[rows] = out.float()
        self._lse[rows] = lse

    def _add(self, piece: Piece) -> None:
        part = self._piece(piece)
        if part is None:
            return
        if piece.is_first or self._out is None or self._lse is None:
            self._put(piece.rows, *part)
            return
        out, lse = part
        before, seen = self._out[piece.rows], self._lse[piece.rows]
        merged = torch.lerp(before.float(), out.float(), torch.sigmoid(lse - seen).unsqueeze(-1))
        if len(merged) == self._step.total_rows:
            self._out = merged
        else:
            self._out = self._out.float()  # answers of all rows at once were left in the dtype that they came in
            self._out[piece.rows] = merged
        if not piece.is_last:
            self._lse[piece.rows] = torch.logaddexp(seen, lse)

    def _tails(self, batch: TailBatch) -> tuple[Tensor, Tensor]:
        """Write the batch's KV to its slots and attend to them, one masked call for all."""
        rows, rules = batch.rows, self._rules
        arena = batch.arena.data[self._layer]
        arena[0][batch.slots, :, batch.offsets] = self._key[rows.rows]
        arena[1][batch.slots, :, batch.offsets] = self._value[rows.rows]
        keys, values = batch.arena.layer(self._layer, rows.first, rows.last, batch.tokens)
        query = rows.take(self._query)  # [slots, width, kv_heads, group, head_dim]
        slots, width, kv_heads, group, _ = query.shape
        mask = batch.mask(rules.window, group, query.dtype)
        stacked = query.transpose(1, 2).flatten(2, 3)
        out, lse = attend(stacked, keys, values, rules.scale, rules.softcap, mask)
        return (
            rows.give(out.view(slots, kv_heads, width, group, -1).transpose(1, 2)),
            rows.give(lse.view(slots, kv_heads, width, group).transpose(1, 2)),
        )

    def _causal(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A span's attention to itself."""
        query, key, value = self._query[rows], self._key[rows], self._value[rows]
        length, kv_heads, group, _ = query.shape
        rules = self._rules
        if rules.softcap is not None or (rules.window is not None and length > rules.window):
            mask = self._step.causal_mask(length, rules.window, group, query.dtype)
            return self._stacked(query, key.transpose(0, 1), value.transpose(0, 1), mask)
        # The group dimension of keys and values has stride 0: every query head of a group reads the same memory.
        grouped = query.permute(1, 2, 0, 3)
        wide_key = key.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, length, key.shape[-1])
        wide_value = value.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, length, value.shape[-1])
        out, lse = attend(grouped, wide_key, wide_value, rules.scale, causal=True)
        return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)

    def _piece(self, piece: Piece) -> tuple[Tensor, Tensor] | None:
        """The attention of a piece's rows to its slice, or None when the window hides all of it from all of them."""
        held, (lowest, highest), rules = piece.keys, piece.positions, self._rules
        if rules.window is not None and lowest - held.end + 1 >= rules.window:
            return None
        key, value = held.layer(self._layer)
        query = self._query[piece.rows]
        mask = None
        if rules.window is not None and highest - held.start >= rules.window:
            mask = piece.mask(self._step.positions, rules.window, query.shape[2], query.dtype)
        return self._stacked(query, key, value, mask, only_decodes=piece.only_decodes)

    def _stacked(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, only_decodes: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The attention of rows to keys, the queries of a group stacked, so that no key is expanded.

        Args:
            query: ``[count, kv_heads, group, head_dim]``.
            key: ``[kv_heads, tokens, head_dim]``.
            value: likewise.
            mask: ``[count * group, tokens]``.
            only_decodes: see :class:`Piece`.
        """
        count, kv_heads, group, _ = query.shape
        rules = self._rules
        stacked = query.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # [1, kv_heads, count * group, head_dim]
        out, lse = attend(
            stacked, key.unsqueeze(0), value.unsqueeze(0), rules.scale, rules.softcap, mask, only_decodes=only_decodes
        )
        return (
            out.view(kv_heads, count, group, -1).transpose(0, 1),
            lse.view(kv_heads, count, group).transpose(0, 1),
        )
