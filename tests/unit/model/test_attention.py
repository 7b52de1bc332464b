"""Attention merged from shared slices equals a plain softmax over all that a query sees, however the KV lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig

from alora_serve.errors import ModelUnsupportedError
from alora_serve.kv.layout import KVLayout
from alora_serve.model import packed_row
from alora_serve.model.attention import PackedAttention
from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.loader import load_base_model
from alora_serve.model.packed_row import PackedRow, ScoreRules
from alora_serve.model.runner import ModelRunner
from alora_serve.model.step import NARROW_TOKENS, Span, Step
from alora_serve.model.tails import TailPool
from tiny_models import VOCABULARY, save_model

torch.set_num_threads(1)
CPU = torch.device("cpu")
HEAD_DIM = 8
SCALES = {torch.float32: 3.0, torch.bfloat16: 1.0}
"""Of queries, keys and values. In float32, scores lie well past the soft caps under test. In bfloat16, scores that are
written out are themselves rounded to 8 bits, as in transformers' eager attention: these are small enough for that not
to hide a mistake."""
BFLOAT16_ERROR = 0.03
"""Values are up to about 4, of which bfloat16 keeps 8 bits; among 4,000 cases the worst was off by 0.017."""


@dataclass(frozen=True)
class Row:
    """One sequence of a packed row: lengths of the shared slices before it, of its own history, and of its new tokens.

    ``shared`` names slices of a common pool, so that equal names are the same memory for several sequences. A private
    row's own KV lies in an arena, beside that of others. Of its last shared slice a row may leave out the last ``less``
    positions, and read it as two, of which the first has ``part`` positions.
    """

    shared: tuple[int, ...]
    history: int
    new: int
    private: bool = False
    less: int = 0
    part: int = 0

    def reads(self, last: KVSlice) -> list[KVSlice]:
        """What it reads of its last shared slice."""
        tokens = max(1, last.tokens - self.less)
        part = min(self.part, tokens - 1)
        cut = [(last.offset, part), (last.offset + part, tokens - part)]
        return [KVSlice(last.segment, offset, count) for offset, count in cut if count]


@dataclass
class Packed:
    """A packed row on random KV, and what each sequence's queries, keys and values are."""

    spans: list[Span]
    query: Tensor
    key: Tensor
    value: Tensor
    wholes: list[tuple[Tensor, Tensor]]


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).mul_(SCALES[dtype]).to(dtype)


def _pack(rows: Sequence[Row], heads: int, kv_heads: int, dtype: torch.dtype, seed: int) -> Packed:
    torch.manual_seed(seed)
    layout = KVLayout(1, kv_heads, HEAD_DIM, str(dtype).removeprefix("torch."))
    pool: dict[tuple[int, ...], KVSlice] = {}
    tails = TailPool(layout, CPU)
    left_behind = tails.take(1, 0)
    left_behind.data.fill_(1e4)

    def segment(capacity: int, start: int, filled: int) -> KVSegment:
        made = KVSegment.allocate(layout, capacity, start, CPU)
        made.data.fill_(float("nan"))  # reading what nobody wrote shows
        made.data[:, :, :, :filled] = _randn(1, 2, kv_heads, filled, HEAD_DIM, dtype=dtype)
        return made

    spans, wholes = [], []
    for row in rows:
        shared = []
        for depth in range(len(row.shared)):
            path = row.shared[: depth + 1]
            start = shared[-1].end if shared else 0
            if path not in pool:
                length = 1 + path[-1] % 7
                pool[path] = KVSlice(segment(length + 3, start - 2, length + 2), 2, length)
            shared.append(pool[path])
        if shared:
            shared[-1:] = row.reads(shared[-1])
        start = shared[-1].end if shared else 0
        if row.private:
            tail = tails.take(row.history + row.new, start)
            tail.data[:, :, :, : row.history] = _randn(1, 2, kv_heads, row.history, HEAD_DIM, dtype=dtype)
            own = KVSlice(tail, 0, row.history + row.new)
        else:
            own = KVSlice(segment(row.history + row.new + 2, start - 1, row.history + 1), 1, row.history + row.new)
        span = Span(tuple(range(row.new)), start + row.history, tuple(shared), own)
        spans.append(span)
        pieces = [*shared, KVSlice(own.segment, own.offset, row.history)]
        wholes.append(tuple(torch.cat([piece.layer(0)[kind] for piece in pieces], dim=1) for kind in (0, 1)))
    total = sum(row.new for row in rows)
    query = _randn(1, heads, total, HEAD_DIM, dtype=dtype)
    key, value = (_randn(1, kv_heads, total, HEAD_DIM, dtype=dtype) for _ in range(2))
    return Packed(spans, query, key, value, wholes)


def _reference(packed: Packed, scale: float, softcap: float | None, window: int | None) -> Tensor:
    """Each sequence by itself, as transformers' eager attention: one softmax over one concatenation, in float64."""
    outs, first = [], 0
    for span, (old_keys, old_values) in zip(packed.spans, packed.wholes, strict=True):
        rows = slice(first, first + len(span.tokens))
        first = rows.stop
        keys = torch.cat([old_keys, packed.key[0][:, rows]], dim=1).double()
        values = torch.cat([old_values, packed.value[0][:, rows]], dim=1).double()
        group = packed.query.shape[1] // keys.shape[0]
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
        scores = packed.query[0][:, rows].double() @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(span.start, span.start + len(span.tokens))[:, None] - torch.arange(keys.shape[1])
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        outs.append(torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ values)
    return torch.cat(outs, dim=1).transpose(0, 1).unsqueeze(0)


def _attend(packed: Packed, **arguments: object) -> Tensor:
    attention = PackedAttention()
    attention.begin(Step(packed.spans, CPU))
    module = SimpleNamespace(layer_idx=0)
    out, weights = attention(module, packed.query, packed.key, packed.value, None, **arguments)  # type: ignore[arg-type]
    attention.end()
    assert weights is None
    return out


def _compare(
    rows: Sequence[Row],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    window: int | None = None,
    seed: int = 0,
) -> float:
    packed = _pack(rows, kv_heads * group, kv_heads, dtype, seed)
    out = _attend(packed, scaling=0.3, softcap=softcap, sliding_window=window)
    assert out.dtype == dtype
    assert out.shape == (1, packed.query.shape[2], kv_heads * group, HEAD_DIM)
    for span, rows_of in zip(packed.spans, Step(packed.spans, CPU).rows, strict=True):
        keys, values = span.destination.layer(0)
        assert torch.equal(keys, packed.key[0][:, rows_of])
        assert torch.equal(values, packed.value[0][:, rows_of])
    return float((out.double() - _reference(packed, 0.3, softcap, window)).abs().max())


rows_strategy = st.lists(
    st.builds(
        Row,
        shared=st.lists(st.integers(0, 2), max_size=3).map(tuple),
        history=st.integers(0, 6),
        new=st.integers(1, 5) | st.just(NARROW_TOKENS + 1),
        private=st.booleans(),
        less=st.integers(0, 5),
        part=st.just(0) | st.integers(1, 5),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=rows_strategy,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    softcap=st.sampled_from([None, None, 5.0]),
    window=st.one_of(st.none(), st.integers(1, 24)),
    seed=st.integers(0, 99),
)
def test_any_cut_into_slices_equals_one_softmax(
    rows: list[Row], kv_heads: int, group: int, softcap: float | None, window: int | None, seed: int
) -> None:
    assert _compare(rows, kv_heads=kv_heads, group=group, softcap=softcap, window=window, seed=seed) < 5e-5


@settings(max_examples=150, deadline=None)
@given(rows=rows_strategy, softcap=st.sampled_from([None, 5.0]), window=st.one_of(st.none(), st.integers(1, 24)))
def test_in_bfloat16_only_its_rounding_is_added(rows: list[Row], softcap: float | None, window: int | None) -> None:
    """The merge itself runs in float32."""
    assert _compare(rows, dtype=torch.bfloat16, softcap=softcap, window=window) < BFLOAT16_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversations_may_take_turns_in_a_batch(dtype: torch.dtype) -> None:
    """All attend to their own in one call, and to what is shared apart: whose rows do not lie beside each other."""
    rows = [Row((conversation,), 3, 1, private=True) for conversation in (5, 6, 5, 6, 5)]
    [batch] = Step(_pack(rows, 4, 2, dtype, 0).spans, CPU).tails
    assert batch.rows.rows == slice(0, 5)
    assert _compare(rows, dtype=dtype) < (5e-5 if dtype == torch.float32 else BFLOAT16_ERROR)


PREFIX = Row(shared=(6, 6), history=0, new=4)  # two slices of seven tokens


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 7, 8, 11, 12, 15, 18, 19, 100])
def test_a_window_ends_wherever_it_ends(window: int, softcap: float | None) -> None:
    """Inside a slice, across two, before both: rows that see nothing of a slice take nothing from it, and no NaN."""
    assert _compare([PREFIX, Row((6, 6), 2, 1)], window=window, softcap=softcap) < 5e-5


def test_the_suite_would_notice_a_forgotten_cap_or_window() -> None:
    packed = _pack([PREFIX], 4, 2, torch.float32, 0)
    full = _attend(packed, scaling=0.3)
    for forgotten in ({"softcap": 5.0}, {"sliding_window": 6}):
        assert (_attend(packed, scaling=0.3, **forgotten) - full).abs().max() > 0.1


def test_without_a_scaling_it_is_that_of_the_head_size() -> None:
    packed = _pack([PREFIX], 4, 2, torch.float32, 0)
    assert torch.equal(_attend(packed), _attend(packed, scaling=HEAD_DIM**-0.5))


def test_a_shared_slice_is_read_once_for_all_who_hold_it() -> None:
    packed = _pack([Row((0, 1), 3, 1), Row((0, 1), 0, 2), Row((0,), 2, 1), Row((0, 1), 1, 1)], 4, 2, torch.float32, 0)
    step = Step(packed.spans, CPU)
    held = [piece.keys for piece in step.pieces]
    assert len(set(held)) == len(held)
    # Two shared slices, and the own history of all but the second.
    assert len(held) == 2 + 3
    assert step.total_rows == 5
    assert step.positions.tolist() == [span.start + index for span in packed.spans for index in range(len(span.tokens))]


def test_what_several_read_of_a_slice_is_read_once_wherever_each_ends() -> None:
    """The turns of one conversation end at different positions of the same memory, and so does a clamped prefix."""
    rows = [Row((6,), 2, 1, private=True), Row((6,), 0, 1, private=True, less=2), Row((6,), 1, 2, private=True, less=2)]
    step = Step(_pack(rows, 4, 2, torch.float32, 0).spans, CPU)
    assert [(piece.keys.start, piece.keys.tokens) for piece in step.pieces] == [(0, 5), (5, 2)]
    assert [piece.rows for piece in step.pieces] == [slice(0, 4), slice(0, 1)]
    assert _compare(rows) < 5e-5


def test_slices_that_adjoin_are_read_as_parts_of_one_that_holds_both() -> None:
    rows = [Row((6,), 0, 1, private=True, part=5), Row((6,), 0, 1, private=True)]
    step = Step(_pack(rows, 4, 2, torch.float32, 0).spans, CPU)
    assert [(piece.keys.start, piece.keys.tokens, piece.rows) for piece in step.pieces] == [
        (0, 5, slice(0, 2)),
        (5, 2, slice(0, 2)),
    ]
    assert _compare(rows) < 5e-5


@settings(max_examples=50, deadline=None)
@given(rows_strategy)
def test_no_position_is_read_twice_and_there_are_never_more_pieces_than_slices(rows: list[Row]) -> None:
    spans = _pack(rows, 4, 2, torch.float32, 0).spans
    read = [piece.keys for piece in Step(spans, CPU).pieces]
    shared = {held for span in spans for held in span.shared}
    own = [span for span in spans if not span.is_narrow_tail and (len(span.tokens) == 1 or span.own_history)]
    assert len(read) <= len(shared) + len(own)
    positions = Counter((id(held.segment), held.offset + place) for held in read for place in range(held.tokens))
    assert max(positions.values(), default=1) == 1


def test_where_a_cut_would_make_more_pieces_slices_stay_whole() -> None:
    segment = KVSegment.allocate(KVLayout(1, 2, HEAD_DIM, "float32"), 10, 0, CPU)
    tails = TailPool(KVLayout(1, 2, HEAD_DIM, "float32"), CPU)
    ends = [KVSlice(segment, 0, 6), KVSlice(segment, 2, 8)]
    spans = [Span((1,), held.end, (held,), KVSlice(tails.take(1, held.end), 0, 1)) for held in ends]
    assert [piece.keys for piece in Step(spans, CPU).pieces] == ends


def test_one_token_reads_its_own_before_what_a_neighbour_has_written_so_far() -> None:
    """Every row must have seen something before its answer is merged with what it sees of a slice that others read."""
    packed = _pack([Row((), 4, 3), Row((6,), 0, 1)], 4, 2, torch.float32, 0)
    first, second = packed.spans
    # The first goes on where the second's slice ends, as a prefill does beside one that took over its first blocks.
    held = KVSlice(first.own.segment, first.own.offset, 4)
    own = KVSlice(KVSegment(second.own.segment.data, 4 - second.own.offset), second.own.offset, 1)
    packed.spans[1] = Span(second.tokens, 4, (held,), own)
    packed.wholes[1] = packed.wholes[0]
    assert (_attend(packed, scaling=0.3) - _reference(packed, 0.3, None, None)).abs().max() < 5e-5


def test_long_answers_of_all_sequences_are_attended_to_in_one_call() -> None:
    rows = [Row((6,), 700 + number, 1, private=True) for number in range(16)]
    [batch] = Step(_pack(rows, 4, 2, torch.float32, 0).spans, CPU).tails
    assert (batch.rows.first, batch.rows.last, batch.tokens) == (0, 16, 716)
    assert _compare(rows) < 5e-5


def test_those_whom_a_wide_gap_parts_are_attended_to_in_calls_of_their_own() -> None:
    """Sixteen answered, three still do: what lies between the last two is not read for nobody."""
    packed = _pack([Row((6,), 700 + number, 1, private=True) for number in range(16)], 4, 2, torch.float32, 0)
    left = [15, 2, 0]  # in slots, the one beside the other two comes first
    packed = Packed(
        [packed.spans[number] for number in left],
        *(each[:, :, left] for each in (packed.query, packed.key, packed.value)),
        [packed.wholes[number] for number in left],
    )
    tails = Step(packed.spans, CPU).tails
    assert [(batch.rows.first, batch.rows.last, batch.tokens) for batch in tails] == [(0, 3, 703), (15, 16, 716)]
    assert (_attend(packed, scaling=0.3) - _reference(packed, 0.3, None, None)).abs().max() < 5e-5


@pytest.mark.parametrize(("softcap", "window"), [(5.0, None), (5.0, 3), (None, 3)])
def test_scores_that_are_written_out_expand_no_key(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, window: int | None
) -> None:
    """A product copies what is expanded by stride: of a span with itself as of a slice before it."""
    heads, kv_heads, new = 6, 2, 20
    packed = _pack([Row((6,), 0, new)], heads, kv_heads, torch.float32, 0)
    multiplied: list[int] = []
    multiply = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda one, other: multiplied.append(other.numel()) or multiply(one, other))
    out = _attend(packed, scaling=0.3, softcap=softcap, sliding_window=window)
    assert multiplied[:2] == [kv_heads * new * HEAD_DIM] * 2, "keys, then values, of the span"
    assert (out - _reference(packed, 0.3, softcap, window)).abs().max() < 5e-5


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masks_are_made_once_for_all_layers_of_one_window(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    """Of a slice that a window cuts, of a span among itself, and of tails."""
    packed = _pack([Row((6,), 0, 4), Row((6,), 0, 1), Row((6,), 2, 2, private=True)], 4, 2, torch.float32, 0)
    masks: list[Tensor | None] = []
    kernel = packed_row.attend

    def attend(*arguments: Tensor | None, **options: bool) -> tuple[Tensor, Tensor]:
        masks.append(arguments[5] if len(arguments) > 5 else None)
        return kernel(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(packed_row, "attend", attend)
    step = Step(packed.spans, CPU)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (packed.query, packed.key, packed.value))

    def layer(window: int) -> list[int | None]:
        masks.clear()
        PackedRow(step, 0, query.unflatten(1, (2, 2)), key, value, ScoreRules(0.3, softcap, window)).attend()
        return [None if mask is None else id(mask) for mask in masks]

    first, other, again = layer(3), layer(2), layer(3)
    assert len(set(first) - {None}) == 3
    assert again == first
    assert not set(other) & (set(first) - {None})


def test_neighbours_change_nothing_but_rounding() -> None:
    row = Row((0, 1, 2), 4, 3)
    alone = _pack([row], 4, 2, torch.float32, 7)
    together = _pack([row, Row((0,), 1, 2), Row((), 0, 5)], 4, 2, torch.float32, 7)
    for name in ("query", "key", "value"):
        getattr(together, name)[:, :, :3] = getattr(alone, name)
    together.spans[0], together.wholes[0] = alone.spans[0], alone.wholes[0]
    assert torch.allclose(_attend(together)[:, :3], _attend(alone), atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_what_would_change_attention_is_refused_by_name(arguments: dict[str, object], named: str) -> None:
    packed = _pack([PREFIX], 4, 2, torch.float32, 0)
    with pytest.raises(ModelUnsupportedError, match=f"passes {named} to attention"):
        _attend(packed, **arguments)


def test_a_mask_of_the_model_is_refused() -> None:
    packed = _pack([PREFIX], 4, 2, torch.float32, 0)
    attention = PackedAttention()
    attention.begin(Step(packed.spans, CPU))
    with pytest.raises(ModelUnsupportedError, match="attention_mask"):
        attention(SimpleNamespace(layer_idx=0), packed.query, packed.key, packed.value, torch.zeros(1))  # type: ignore[arg-type]


def test_a_module_that_is_not_causal_is_refused() -> None:
    packed = _pack([PREFIX], 4, 2, torch.float32, 0)
    attention = PackedAttention()
    attention.begin(Step(packed.spans, CPU))
    module = SimpleNamespace(layer_idx=0, is_causal=False)
    with pytest.raises(ModelUnsupportedError, match="is_causal"):
        attention(module, packed.query, packed.key, packed.value, None)  # type: ignore[arg-type]


def test_what_changes_nothing_is_accepted() -> None:
    packed = _pack([PREFIX], 4, 2, torch.float32, 0)
    plain = _attend(packed)
    assert torch.equal(_attend(packed, position_ids=torch.zeros(1), is_causal=True, use_cache=False), plain)
    assert torch.equal(_attend(packed, is_causal=None, s_aux=None), plain)


def test_outside_a_step_attention_is_a_defect() -> None:
    packed = _pack([PREFIX], 4, 2, torch.float32, 0)
    attention = PackedAttention()
    attention.begin(Step(packed.spans, CPU))
    attention.end()
    with pytest.raises(RuntimeError, match="outside a step"):
        attention(SimpleNamespace(layer_idx=0), packed.query, packed.key, packed.value, None)  # type: ignore[arg-type]


# --- rotary frequencies that depend on the length seen ----------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [8.0] * 8,
    "original_max_position_embeddings": 64,
}
LENGTH_DEPENDENT = {
    "llama": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "phi3": {"max_position_embeddings": 512, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
}


def _tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("kind", sorted(LENGTH_DEPENDENT))
def test_a_long_neighbour_does_not_turn_a_short_sequence(kind: str, tmp_path) -> None:
    """The model takes the longest position of the packed row for the length of every sequence in it."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        **sizes, **LENGTH_DEPENDENT[kind],
    )  # fmt: skip
    model = load_base_model(save_model(tmp_path / kind, config), dtype="float32")
    assert model.context_tokens == 64
    runner = ModelRunner(model)

    def run(lengths: Sequence[int]) -> Tensor:
        spans = []
        for length in lengths:
            segment = KVSegment.allocate(model.layout, length, 0, CPU)
            spans.append(Span(_tokens(length, length), 0, (), KVSlice(segment, 0, length)))
        logits = runner.forward(spans, [True] * len(spans))
        assert logits is not None
        return logits[0]

    solo = run([20])
    assert (run([20, model.context_tokens]) - solo).abs().max() < 1e-4
    # Past the cap it would: that is what the cap is for.
    assert (run([20, 2 * model.context_tokens]) - solo).abs().max() > 1e-2
    assert (run([20]) - solo).abs().max() < 1e-4
