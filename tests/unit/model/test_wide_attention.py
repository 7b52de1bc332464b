"""Attention written out in bfloat16 tells scores as exactly as float32 does, in however many lanes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alora_serve.kv.layout import KVLayout
from alora_serve.model import attention_kernels, wide_attention
from alora_serve.model.device import CPU
from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.packed_row import PackedRow, ScoreRules
from alora_serve.model.step import Span, Step
from alora_serve.model.tails import TailPool
from alora_serve.model.wide_attention import LEAST_ROWS, LEAST_SCORES, attend_widely, suits

SCORES_ERROR = 40 * 2.0**-17
"""Scores are up to 40 here, of which two bfloat16 numbers keep 16 digits; one would be off by up to 0.08."""


@pytest.fixture(params=[1, 2])
def lane_count(request: pytest.FixtureRequest, two_sleeping_threads: None) -> int:
    count: int = request.param
    torch.set_num_threads(count)
    return count


def problem(rows: int, tokens: int, head_dim: int = 64, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A query, and keys and values in the middle of a larger segment."""
    torch.manual_seed(rows + tokens)
    query = torch.randn(1, heads, rows, head_dim).mul_(3).bfloat16()
    segment = torch.randn(2, heads, tokens + 100, head_dim).mul_(3).bfloat16()[:, :, 30 : tokens + 30]
    return query, segment[0].unsqueeze(0), segment[1].unsqueeze(0)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    return torch.softmax(scores, dim=-1) @ value.double(), torch.logsumexp(scores, dim=-1)


@pytest.mark.parametrize(("rows", "tokens"), [(768, 256), (100, 300), (385, 1500), (97, 6000), (15, 6000), (1, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_answers_as_float64_does(rows: int, tokens: int, head_dim: int, lane_count: int) -> None:
    query, key, value = problem(rows, tokens, head_dim)
    scale = head_dim**-0.5
    out, lse = attend_widely(query, key, value, scale)
    right_out, right_lse = exact(query, key, value, scale)
    assert (lse.dtype, lse.shape, out.dtype, out.shape) == (torch.float32, right_lse.shape, torch.bfloat16, query.shape)
    assert (lse - right_lse).abs().max() < SCORES_ERROR
    assert (out - right_out).abs().max() < 2**-8 * value.abs().max()


def test_one_product_alone_would_be_too_coarse() -> None:
    """What the second product is for."""
    query, key, _ = problem(100, 300)
    coarse = torch.logsumexp((query @ key.transpose(-1, -2)).float() * 0.125, dim=-1)
    _, right = exact(query, key, key, 0.125)
    assert (coarse - right).abs().max() > 100 * SCORES_ERROR


def test_it_is_taken_where_there_is_enough_to_do(lane_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_attention, "_has_fast_products", lambda: True)
    query, key, value = problem(LEAST_ROWS, -(-LEAST_SCORES // LEAST_ROWS))
    assert suits(query, key)
    assert not suits(query, key[:, :, 1:])
    assert not suits(query[:, :, 1:], torch.cat((key, key), dim=2))
    assert not suits(query.float(), key.float())
    out, lse = attention_kernels.attend(query, key, value, 0.125)
    again, its_lse = attend_widely(query, key, value, 0.125)
    assert torch.equal(out, again)
    assert torch.equal(lse, its_lse)


@pytest.mark.parametrize(
    ("tokens_of_spans", "written_out"),
    [
        pytest.param([1] * 32, False, id="a full batch that decodes"),
        pytest.param([32], True, id="a chunk of a prompt"),
        pytest.param([1] * 16 + [16], True, id="a chunk beside those that decode"),
    ],
)
@pytest.mark.usefixtures("two_sleeping_threads")
def test_steps_that_only_decode_never_take_it(
    tokens_of_spans: list[int], written_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one conversation, a full batch of SmolLM2 has rows and scores enough."""
    monkeypatch.setattr(wide_attention, "_has_fast_products", lambda: True)
    taken: list[tuple[int, int]] = []

    def watch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        taken.append((query.shape[2], key.shape[2]))
        return attend_widely(query, key, value, scale)

    monkeypatch.setattr(attention_kernels, "attend_widely", watch)
    layout, tokens = KVLayout(1, 3, 64, "bfloat16"), -(-LEAST_SCORES // LEAST_ROWS)
    conversation = KVSegment.allocate(layout, tokens, 0, CPU)
    conversation.data.normal_()
    tails = TailPool(layout, CPU)
    shared = (KVSlice(conversation, 0, tokens),)
    step = Step(
        [Span(tuple(range(new)), tokens, shared, KVSlice(tails.take(new, tokens), 0, new)) for new in tokens_of_spans],
        CPU,
    )
    query = torch.randn(32, 3, 3, 64).bfloat16()
    key, value = torch.randn(2, 32, 3, 64).bfloat16()
    out = PackedRow(step, 0, query, key, value, ScoreRules(0.125, None, None)).attend()
    assert out.isfinite().all()
    assert taken == [(LEAST_ROWS, tokens)] * written_out


def test_masks_causality_and_caps_are_left_to_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "suits", lambda *_: pytest.fail("asked"))
    query, key, value = problem(300, 300)
    mask = torch.zeros(1, 1, 300, 300, dtype=torch.bfloat16)
    attention_kernels.attend(query, key, value, 0.125, mask=mask)
    attention_kernels.attend(query, key, value, 0.125, causal=True)
    attention_kernels.attend(query, key, value, 0.125, softcap=30.0)
