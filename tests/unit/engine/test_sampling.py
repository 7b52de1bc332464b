"""Tokens are chosen as the parameters say, and the same again wherever a stream is taken up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RepetitionPenaltyLogitsProcessor

from alora_serve.engine import sampling
from alora_serve.engine.penalties import History, penalize
from alora_serve.engine.sampling import Chosen, uniform
from alora_serve.types import SamplingParams

torch.set_num_threads(1)
VOCABULARY = 12


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    masks: Sequence[bytes | None] = (),
) -> list[Chosen]:
    """As a worker that takes up streams with these tokens."""
    histories = [History(*each) for each in zip(params, prompts, generated, strict=True)]
    chosen = sampling.choose_tokens(logits, params, histories, [len(tokens) for tokens in generated], masks)
    tokens = [choice for choice in chosen if choice is not None]
    assert len(tokens) == len(chosen)
    return tokens


def _logits(seed: int, rows: int = 1, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def _choose(
    logits: Tensor, prompt: Sequence[int] = (0,), generated: Sequence[int] = (), **params: object
) -> tuple[int, float | None]:
    [choice] = choose_tokens(logits.clone(), [SamplingParams(**params)], [prompt], [generated])  # type: ignore[arg-type]
    return choice.token_id, choice.logprob


def _draws(logits: Tensor, count: int, **params: object) -> Counter[int]:
    return Counter(_choose(logits, generated=[0] * position, temperature=1.0, **params)[0] for position in range(count))


# --- greedy -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999))
def test_without_temperature_the_likeliest_token_is_taken(seed: int) -> None:
    logits = _logits(seed)
    assert _choose(logits)[0] == int(logits.argmax())
    # A seed and truncation have no say in it.
    assert _choose(logits, seed=3, top_k=2, top_p=0.1, min_p=0.5)[0] == int(logits.argmax())


def test_of_equal_tokens_the_first_is_taken() -> None:
    assert _choose(torch.tensor([[0.0, 5.0, 5.0, 1.0]]))[0] == 1


def test_rows_are_chosen_each_by_its_own_parameters() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 4] = 1.0
    params = [SamplingParams(), SamplingParams(logit_bias={7: 9.0}), SamplingParams(temperature=1.0, seed=1, top_k=1)]
    assert choose_tokens(logits, params, [(0,)] * 3, [()] * 3) == [Chosen(4), Chosen(7), Chosen(4)]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.5, "seed": 1, "top_k": 3}])
@pytest.mark.parametrize("row", [[math.nan] * 4, [0.0, 1.0, math.nan, 2.0], [math.inf, 0.0, 0.0, 0.0], [-math.inf] * 4])
def test_where_logits_are_not_finite_no_token_is_chosen_and_other_rows_have_theirs(
    params: dict[str, Any], row: list[float]
) -> None:
    logits = torch.tensor([[0.0, 0.0, 9.0, 0.0], row, [0.0, -math.inf, -math.inf, -math.inf]])
    kinds = [SamplingParams(**params, logprobs=True, top_logprobs=2)] * 2 + [SamplingParams(**params)]
    first, none, last = sampling.choose_tokens(logits, kinds, [History(kind, (0,)) for kind in kinds], [0] * 3)
    assert none is None
    assert first is not None
    assert (first.token_id, len(first.top)) == (2, 2)
    assert last == Chosen(0)


def test_logprobs_are_those_of_the_model_whatever_is_done_to_choose() -> None:
    logits = _logits(5)
    expected = torch.log_softmax(logits, dim=-1)[0]
    for params in (
        {},
        {"logit_bias": {3: 100.0}},
        {"temperature": 5.0, "seed": 1, "top_k": 2},
        {"repetition_penalty": 9.0},
    ):
        token, logprob = _choose(logits, logprobs=True, **params)
        assert logprob == pytest.approx(float(expected[token]), abs=1e-6)
    assert _choose(logits)[1] is None


# --- penalties and bias -----------------------------------------------------------------------------------------------

some_tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8)


def _effective(logits: Tensor, prompt: Sequence[int], generated: Sequence[int], **params: object) -> Tensor:
    """The logits that choosing works on, which it leaves in its input."""
    changed = logits.clone()
    choose_tokens(changed, [SamplingParams(**params)], [prompt], [generated])  # type: ignore[arg-type]
    return changed


@given(st.integers(0, 999), some_tokens, some_tokens, st.sampled_from([0.5, 1.0, 1.3, 2.0]))
def test_the_repetition_penalty_is_that_of_transformers(
    seed: int, prompt: list[int], generated: list[int], penalty: float
) -> None:
    logits = _logits(seed)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + generated]), logits.clone())
    assert torch.equal(_effective(logits, prompt, generated, repetition_penalty=penalty), expected)


@given(st.integers(0, 999), some_tokens, some_tokens, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_generated_tokens_alone(
    seed: int, prompt: list[int], generated: list[int], presence: float, frequency: float
) -> None:
    logits = _logits(seed)
    expected = logits.clone()
    for token, times in Counter(generated).items():
        expected[0, token] -= presence + frequency * times
    changed = _effective(logits, prompt, generated, presence_penalty=presence, frequency_penalty=frequency)
    assert torch.allclose(changed, expected, atol=1e-5)
    untouched = _effective(logits, prompt, (), presence_penalty=presence, frequency_penalty=frequency)
    assert torch.equal(untouched, logits)


def _row_by_row(row: Tensor, param: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
    """Penalties and biases of one row, from all of its tokens."""
    if param.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *generated}))
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * param.repetition_penalty, scores / param.repetition_penalty)
    if generated and (param.presence_penalty or param.frequency_penalty):
        counts = Counter(generated)
        times = torch.tensor(list(counts.values()), dtype=row.dtype)
        row[torch.tensor(list(counts))] -= param.presence_penalty + param.frequency_penalty * times
    if param.logit_bias:
        row[torch.tensor(list(param.logit_bias))] += torch.tensor(list(param.logit_bias.values()), dtype=row.dtype)


penalized = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.1, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.3]),
    frequency_penalty=st.sampled_from([0.0, 0.1, -1.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-3, 3), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(penalized, some_tokens, st.lists(st.integers(0, VOCABULARY - 1), max_size=90)), min_size=1, max_size=4
    ),
    st.data(),
)
def test_a_batch_is_penalized_to_the_bit_as_row_by_row_and_from_whatever_token_on(
    rows: list[tuple[SamplingParams, list[int], list[int]]], data: st.DataObject
) -> None:
    logits = _logits(len(rows[0][1]), rows=len(rows))
    expected = logits.clone()
    histories = []
    for row, (params, prompt, generated) in enumerate(rows):
        _row_by_row(expected[row], params, prompt, generated)
        taken_up = data.draw(st.integers(0, len(generated)))
        history = History(params, prompt, generated[:taken_up])
        for token in generated[taken_up:]:
            history.push(token)
        histories.append(history)
    penalize(logits, histories)
    assert torch.equal(logits, expected)


class _Kernels(TorchDispatchMode):
    """Counts what torch computes; a slice is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.aten.slice.Tensor
        return func(*args, **(kwargs or {}))


def test_the_penalties_of_many_rows_take_as_many_calls_as_those_of_few() -> None:
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={1: 2.0})

    def calls(rows: int) -> int:
        histories = [History(params, (1, 2, 3), (row % VOCABULARY,)) for row in range(rows)]
        logits = _logits(0, rows=rows)
        with _Kernels() as counted:
            penalize(logits, histories)
        return counted.count

    assert calls(16) == calls(2)


def test_bias_is_added_to_just_the_tokens_named() -> None:
    logits = _logits(1)
    expected = logits.clone()
    expected[0, 3] += 2.5
    expected[0, 9] -= 100.0
    assert torch.equal(_effective(logits, (0,), (), logit_bias={3: 2.5, 9: -100.0}), expected)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_random_numbers_are_keyed_by_seed_sample_and_position() -> None:
    drawn = {
        uniform(seed, sample, position) for seed in (0, 1, 2**63, -1) for sample in (0, 1, 5) for position in range(50)
    }
    assert len(drawn) == 4 * 3 * 50
    assert all(0.0 <= value < 1.0 for value in drawn)


def test_random_numbers_are_those_of_earlier_releases() -> None:
    """A stream that an old worker began goes on here: other numbers would be another answer."""
    numbers = [round(uniform(*key), 12) for key in ((0, 0, 0), (42, 1, 7), (2**64 - 1, 3, 10_000))]
    assert numbers == [
        0.011546754286,
        0.864717011321,
        0.677487077893,
    ]


def test_a_stream_taken_up_anywhere_draws_the_same() -> None:
    rows = [_logits(position) for position in range(30)]

    def run(generated: list[int]) -> list[int]:
        while len(generated) < len(rows):
            position = len(generated)
            token, _ = _choose(
                rows[position], generated=generated, temperature=0.9, top_p=0.9, seed=7, frequency_penalty=0.3
            )
            generated.append(token)
        return generated

    whole = run([])
    for position in range(len(rows)):
        assert run(whole[:position]) == whole
    assert len(set(whole)) > 3


def test_the_samples_of_one_request_differ() -> None:
    logits = _logits(0, spread=0.5)
    answers = [
        tuple(
            _choose(logits, generated=[0] * position, temperature=1.0, seed=7, sample_index=sample)[0]
            for position in range(10)
        )
        for sample in range(5)
    ]
    assert len(set(answers)) == 5


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = _logits(0, rows=4)
    params = [SamplingParams(temperature=1.0, seed=row, sample_index=row) for row in range(4)]
    together = choose_tokens(logits.clone(), params, [(0,)] * 4, [()] * 4)
    alone = [choose_tokens(logits[row : row + 1].clone(), [params[row]], [(0,)], [()])[0] for row in range(4)]
    assert together == alone


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 3}, {"top_k": 40}, {"top_p": 0.5}, {"top_p": 0.99}, {"min_p": 0.02}]
)
def test_a_shortlist_of_candidates_changes_no_token(
    monkeypatch: pytest.MonkeyPatch, spread: float, truncation: dict[str, float]
) -> None:
    """Rounded logits: many tokens are equally likely, and whether one is in the list must not decide their order."""
    rows = (torch.randn(64, 300, generator=torch.Generator().manual_seed(5)) * spread).bfloat16().float()
    params = [SamplingParams(temperature=0.9, seed=row, **truncation) for row in range(64)]  # type: ignore[arg-type]

    def drawn(shortlist: int) -> list[int]:
        monkeypatch.setattr("alora_serve.engine.sampling.SHORTLIST", shortlist)
        return [choice.token_id for choice in choose_tokens(rows.clone(), params, [(0,)] * 64, [()] * 64)]

    assert drawn(16) == drawn(300)


def test_tokens_that_rounding_puts_in_another_order_are_drawn_alike() -> None:
    """In the order of likelihood, which is noise among equals, nearly every draw would fall on another token."""
    rows = torch.zeros(1000, 300)
    noisy = rows + torch.randn(1000, 300, generator=torch.Generator().manual_seed(1)) * 1e-6
    params = [SamplingParams(temperature=1.0, seed=row) for row in range(1000)]

    def drawn(logits: Tensor) -> list[int]:
        return [choice.token_id for choice in choose_tokens(logits.clone(), params, [(0,)] * 1000, [()] * 1000)]

    assert drawn(rows) == drawn(noisy)


def test_drawing_without_a_seed_is_a_defect() -> None:
    with pytest.raises(ValueError, match="must carry a seed"):
        _choose(_logits(0), temperature=1.0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-3])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.0, 40.0, -3.0, 39.0]])
    assert _choose(logits, temperature=temperature, seed=1)[0] == 1


def _allowed(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Truncation written naively: each rule on the whole distribution, the likeliest token always kept."""
    ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept, mass = {ranked[0]}, 0.0
    for rank, token in enumerate(ranked):
        if (not top_k or rank < top_k) and mass < top_p and probabilities[token] >= min_p * probabilities[ranked[0]]:
            kept.add(token)
        mass += probabilities[token]
    return kept


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, VOCABULARY, 99]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_truncation_keeps_just_the_tokens_a_naive_one_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = _logits(seed)
    probabilities = torch.softmax(logits[0].double() / temperature, dim=-1).tolist()
    allowed = _allowed(probabilities, top_k, top_p, min_p)
    drawn = {
        _choose(
            logits, generated=[0] * position, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=1
        )[0]
        for position in range(100)
    }
    assert drawn <= allowed
    # What has a good chance of being drawn is.
    total = sum(probabilities[token] for token in allowed)
    assert {token for token in allowed if probabilities[token] / total > 0.2} <= drawn


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (2.0, 0), (1.0, 4)])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float, top_k: int) -> None:
    logits, count = _logits(3, spread=1.0), 4000
    probabilities = torch.softmax(logits[0].double() / temperature, dim=-1)
    if top_k:
        probabilities[probabilities.argsort(descending=True)[top_k:]] = 0.0
        probabilities /= probabilities.sum()
    drawn = Counter(
        _choose(logits, generated=range(position), temperature=temperature, top_k=top_k, seed=11)[0]
        for position in range(count)
    )
    expected = [(token, float(p) * count) for token, p in enumerate(probabilities) if p > 0]
    assert set(drawn) <= {token for token, _ in expected}
    chi_square = sum((drawn[token] - often) ** 2 / often for token, often in expected)
    # 99.9 % of right samplers stay below this for 11 degrees of freedom; the seed is fixed, so this one always does.
    assert chi_square < 31.3


# --- forbidden tokens -------------------------------------------------------------------------------------------------


def _mask(*allowed: int) -> bytes:
    return np.packbits(np.isin(np.arange(16), allowed), bitorder="little").tobytes()


@given(
    st.integers(0, 999),
    st.sets(st.integers(0, VOCABULARY - 1), min_size=1),
    st.sampled_from([{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 5, "top_p": 0.9}]),
    st.sampled_from([0.0, 1e-6, 0.7, 50.0]),
)
def test_what_is_forbidden_is_never_chosen_and_the_rest_as_if_it_were_all(
    seed: int, allowed: set[int], truncation: dict[str, float], temperature: float
) -> None:
    logits, bias = _logits(seed), dict.fromkeys(range(0, VOCABULARY, 3), 1.5)
    params = SamplingParams(temperature=temperature, seed=seed, logit_bias=bias, frequency_penalty=1.0, **truncation)  # type: ignore[arg-type]
    [choice] = choose_tokens(logits.clone(), [params], [(0,)], [(1, 1)], [_mask(*allowed)])
    assert choice.token_id in allowed
    kept = torch.full_like(logits, -1e30)
    kept[:, list(allowed)] = logits[:, list(allowed)]
    [alike] = choose_tokens(kept, [params], [(0,)], [(1, 1)])
    assert choice.token_id == alike.token_id


def test_rows_are_bound_each_by_its_own_mask() -> None:
    logits = _logits(3, rows=4)
    params = [SamplingParams(logprobs=True)] * 4
    free = choose_tokens(logits.clone(), params, [(0,)] * 4, [()] * 4)
    some = choose_tokens(logits.clone(), params, [(0,)] * 4, [()] * 4, [None, _mask(7), None, _mask(2)])
    assert [choice.token_id for choice in some] == [free[0].token_id, 7, free[2].token_id, 2]
    # Probabilities are those of the model, of which the form knows nothing.
    assert some[1].logprob == pytest.approx(float(torch.log_softmax(logits[1], -1)[7]))


def test_the_likeliest_tokens_come_in_order_and_of_equal_ones_the_lower_id_first() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [9, 4]] = 3.0
    logits[0, 6] = 2.0
    [choice] = choose_tokens(logits, [SamplingParams(logprobs=True, top_logprobs=5, logit_bias={0: 9.0})], [(0,)], [()])
    assert [token for token, _ in choice.top] == [4, 9, 6, 0, 1]
    assert choice.token_id == 0
    assert choice.logprob == choice.top[3][1]


def _all_in_order(logits: Tensor, count: int) -> list[int]:
    """Every token, likeliest first, of equally likely ones the lower id first."""
    return sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))[:count]


@given(data=st.data())
def test_the_likeliest_of_rows_that_ask_for_different_numbers_of_them(data: st.DataObject) -> None:
    """Some ask for none, some for more than there are; many tokens are equally likely, also where the list ends."""
    rows = data.draw(st.lists(st.sampled_from([None, 0, 1, 3, 5, VOCABULARY, 20]), min_size=1, max_size=5))
    values = st.lists(st.integers(0, 3), min_size=VOCABULARY, max_size=VOCABULARY)
    logits = torch.tensor([data.draw(values) for _ in rows], dtype=torch.float32)
    params = [SamplingParams(logprobs=count is not None, top_logprobs=count or 0) for count in rows]
    choices = choose_tokens(logits.clone(), params, [(0,)] * len(rows), [()] * len(rows))
    for choice, row, count in zip(choices, logits, rows, strict=True):
        logprobs = torch.log_softmax(row, dim=-1)
        assert choice.token_id == int(row.argmax())
        assert choice.logprob == (None if count is None else float(logprobs[choice.token_id]))
        assert choice.top == tuple((token, float(logprobs[token])) for token in _all_in_order(row, count or 0))


def test_the_likeliest_of_many_rows_take_as_many_calls_as_those_of_few() -> None:
    def calls(rows: int) -> int:
        params = [SamplingParams(logprobs=True, top_logprobs=1 + row % 5) for row in range(rows)]
        histories = [History(each, (0,)) for each in params]
        with _Kernels() as counted:
            sampling.choose_tokens(_logits(0, rows=rows), params, histories, [0] * rows)
        return counted.count

    assert calls(16) == calls(2)


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.999}, {"top_k": 9}])
def test_not_even_rounding_draws_what_is_forbidden(
    monkeypatch: pytest.MonkeyPatch, truncation: dict[str, float]
) -> None:
    """The largest number that can be drawn lies at or beyond the sum of rounded probabilities."""
    monkeypatch.setattr("alora_serve.engine.sampling.uniform", lambda *key: float(np.nextafter(1.0, 0.0)))
    params = SamplingParams(temperature=1.0, seed=1, **truncation)  # type: ignore[arg-type]
    for seed in range(50):
        [choice] = choose_tokens(_logits(seed), [params], [(0,)], [()], [_mask(3, 4, 7, 8, 10)])
        assert choice.token_id in {3, 4, 7, 8, 10}
