"""Attention over a packed row of sequences whose KV lies in shared slices.

Each distinct slice is read once a layer: the queries of every sequence that holds it are stacked per KV head, so
grouped-query keys are never expanded. What a query sees is the union of disjoint pieces (shared slices, its own
history, the causal triangle of its own span), computed apart and merged by their log-sum-exp:

    lse = logaddexp(lse_1, lse_2),   out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse)

The reference is transformers' ``eager_attention_forward``; soft caps apply to scores before the softmax, and a windowed
layer masks per query. A query that sees nothing of a piece has log-sum-exp ``-inf`` there and takes nothing from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from alora_serve.errors import ModelUnsupportedError
from alora_serve.model.kv_memory import KVSlice


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
    def reads(self) -> tuple[KVSlice, ...]:
        """Slices read besides the causal triangle of the new tokens. A single token reads itself with its history."""
        new = len(self.tokens)
        if new == 1:
            return (*self.shared, self.own)
        if self.own.tokens == new:
            return self.shared
        return (*self.shared, KVSlice(self.own.segment, self.own.offset, self.own.tokens - new))


@dataclass(frozen=True, slots=True)
class _Piece:
    """One slice and the rows of the packed row that read it."""

    keys: KVSlice
    rows: slice | Tensor
    positions: tuple[int, int]  # lowest and highest query position among the rows


class Step:
    """The plan of one forward pass: which rows read which slices. The same for every layer."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans = tuple(spans)
        self.rows: list[slice] = []
        readers: dict[KVSlice, list[int]] = defaultdict(list)
        first = 0
        for index, span in enumerate(self.spans):
            self.rows.append(slice(first, first + len(span.tokens)))
            first += len(span.tokens)
            for held in span.reads:
                readers[held].append(index)
        self.total_rows = first
        self.causal = [index for index, span in enumerate(self.spans) if len(span.tokens) > 1]
        positions = [position for span in self.spans for position in range(span.start, span.start + len(span.tokens))]
        self.positions = torch.tensor(positions, device=device)
        self.token_ids = torch.tensor([token for span in self.spans for token in span.tokens], device=device)
        self.pieces = [self._piece(held, indices, device) for held, indices in readers.items()]

    def _piece(self, held: KVSlice, indices: list[int], device: torch.device) -> _Piece:
        spans = [self.spans[index] for index in indices]
        bounds = (min(s.start for s in spans), max(s.start + len(s.tokens) - 1 for s in spans))
        rows: slice | Tensor
        if all(later == earlier + 1 for earlier, later in pairwise(indices)):
            rows = slice(self.rows[indices[0]].start, self.rows[indices[-1]].stop)
        else:
            listed = [row for index in indices for row in range(self.rows[index].start, self.rows[index].stop)]
            rows = torch.tensor(listed, device=device)
        return _Piece(held, rows, bounds)


class PackedAttention:
    """The attention function registered with transformers for one model.

    ``begin(step)`` before the model's forward, ``end()`` after; one thread. transformers calls :meth:`__call__` once a
    layer with the whole packed row.

    Attributes:
        windows_seen: the window each layer was called with in the last pass; the loader checks it against the config.
    """

    def __init__(self) -> None:
        self._step: Step | None = None
        self.windows_seen: dict[int, int | None] = {}

    def begin(self, step: Step) -> None:
        """Set the plan for the forward pass that follows."""
        self._step = step
        self.windows_seen.clear()

    def end(self) -> None:
        """Forget the plan."""
        self._step = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """Write the row's KV to its destinations and attend.

        Args:
            query: ``[1, heads, rows, head_dim]``, rotated.
            key: ``[1, kv_heads, rows, head_dim]``, rotated.
            value: ``[1, kv_heads, rows, head_dim]``.

        Returns:
            ``[1, rows, heads, head_dim]`` in the query's dtype, and no weights.

        Raises:
            ModelUnsupportedError: the model passes an argument that changes attention in a way not served.
        """
        step = self._step
        if step is None:
            raise RuntimeError("attention called outside a step")
        refused = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
        # Attention in both directions would depend on tokens that are not there yet.
        causal = others.get("is_causal")
        both_ways = not (getattr(module, "is_causal", True) if causal is None else causal)
        found = {"attention_mask": attention_mask is not None, "dropout": bool(dropout), "is_causal=False": both_ways}
        refused += [name for name, given in found.items() if given]
        if refused:
            raise ModelUnsupportedError(
                f"{type(module).__name__} passes {', '.join(refused)} to attention, which this engine does not serve"
            )
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.windows_seen[layer] = sliding_window
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys, values = key[0], value[0]
        for span, rows in zip(step.spans, step.rows, strict=True):
            own_keys, own_values = span.destination.layer(layer)
            own_keys.copy_(keys[:, rows])
            own_values.copy_(values[:, rows])
        merged = _Merged(query[0], value.shape[-1])
        for index in step.causal:
            rows = step.rows[index]
            own = (query[0][:, rows], keys[:, rows], values[:, rows])
            merged.add(rows, *_causal(*own, scale, softcap, sliding_window))
        for piece in step.pieces:
            part = _shared(query[0], piece, layer, scale, softcap, sliding_window, step.positions)
            if part is not None:
                merged.add(piece.rows, *part)
        return merged.result(query.dtype).unsqueeze(0), None


_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_router_logits", "is_causal", "cache_position"}
)
"""Keyword arguments transformers hands to every attention function and that do not change the result here."""


class _Merged:
    """Running merge of disjoint pieces of attention, in float32."""

    def __init__(self, query: Tensor, head_dim: int) -> None:
        heads, rows, _ = query.shape
        self._out = torch.zeros((heads, rows, head_dim), dtype=torch.float32, device=query.device)
        self._lse = torch.full((heads, rows), float("-inf"), dtype=torch.float32, device=query.device)

    def add(self, rows: slice | Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge a piece: ``out`` ``[heads, n, head_dim]``, ``lse`` ``[heads, n]`` for these rows."""
        old = self._lse[:, rows]
        new = torch.logaddexp(old, lse)
        # Both -inf gives NaN weights; such a row has seen nothing yet and keeps its zeros.
        keep = torch.exp(old - new).nan_to_num_(0.0).unsqueeze(-1)
        take = torch.exp(lse - new).nan_to_num_(0.0).unsqueeze(-1)
        self._out[:, rows] = self._out[:, rows] * keep + out * take
        self._lse[:, rows] = new

    def result(self, dtype: torch.dtype) -> Tensor:
        """``[rows, heads, head_dim]``."""
        return self._out.transpose(0, 1).to(dtype)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """A span's attention to itself: ``[heads, n, head_dim]`` and ``[heads, n]``."""
    heads, length, head_dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    grouped = query.reshape(kv_heads, group, length, head_dim)
    # The group dimension of keys and values has stride 0: every query head of a group reads the same memory.
    wide_key = key.unsqueeze(1).expand(kv_heads, group, length, key.shape[-1])
    wide_value = value.unsqueeze(1).expand(kv_heads, group, length, value.shape[-1])
    if softcap is None and (window is None or length <= window):
        out, lse = _fused(grouped, wide_key, wide_value, scale, causal=True)
    else:
        distance = torch.arange(length, device=query.device).unsqueeze(1) - torch.arange(length, device=query.device)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        out, lse = _plain(grouped, wide_key, wide_value, scale, softcap, visible)
    return out.reshape(heads, length, -1), lse.reshape(heads, length)


def _shared(
    query: Tensor,
    piece: _Piece,
    layer: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    positions: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """The attention of a piece's rows to its slice, or None when the window hides all of it from all of them."""
    held = piece.keys
    lowest, highest = piece.positions
    if window is not None and lowest - held.end + 1 >= window:
        return None
    key, value = held.layer(layer)
    selected = query[:, piece.rows]
    heads, count, head_dim = selected.shape
    kv_heads = key.shape[0]
    stacked = selected.reshape(1, kv_heads, heads // kv_heads * count, head_dim)
    if softcap is None and (window is None or highest - held.start < window):
        out, lse = _fused(stacked, key.unsqueeze(0), value.unsqueeze(0), scale, causal=False)
    else:
        visible = None
        if window is not None:
            key_positions = torch.arange(held.start, held.end, device=query.device)
            visible = (positions[piece.rows].unsqueeze(1) - key_positions) < window  # [count, tokens]
            visible = visible.repeat(heads // kv_heads, 1)
        out, lse = _plain(stacked, key.unsqueeze(0), value.unsqueeze(0), scale, softcap, visible)
    return out.reshape(heads, count, -1), lse.reshape(heads, count)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention with its log-sum-exp: ``[batch, heads, n, head_dim]`` in and out, and ``[batch, heads, n]``."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=None, scale=scale
        )
        return out, lse
    visible = None
    if causal:
        visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return _plain(query, key, value, scale, None, visible)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention written out, for soft caps and per-query masks. ``visible`` is ``[n, tokens]``, True where seen."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num_(0.0)
    return torch.matmul(weights.to(value.dtype), value), lse
