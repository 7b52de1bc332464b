"""Speeds that routers rely on are measured on steps that mean something."""

from __future__ import annotations

import pytest

from alora_serve.engine.rates import RecentMean, RecentSpeed, StepRates


def observed(rates: StepRates, *, decoding: int, prompt: int, seconds: float) -> StepRates:
    rates.observe(decoding=decoding, prompt_tokens=prompt, budget_tokens=256, seconds=seconds)
    return rates


def test_steps_that_only_decode_give_the_step_time_and_nothing_else() -> None:
    assert observed(StepRates(), decoding=4, prompt=0, seconds=0.05) == StepRates(step_seconds=0.05)


@pytest.mark.parametrize("prompt", [128, 256])
def test_a_prompt_that_runs_alone_takes_the_whole_step(prompt: int) -> None:
    rates = observed(StepRates(step_seconds=0.1), decoding=0, prompt=prompt, seconds=0.5)
    assert rates == StepRates(step_seconds=0.1, prefill_tokens_per_second=2 * prompt)


@pytest.mark.parametrize("prompt", [32, 64])
def test_beside_sequences_that_decode_a_prompt_takes_what_the_step_is_longer(prompt: int) -> None:
    """A busy worker gives a prompt no more than a quarter of a step, and must learn what computing costs."""
    rates = observed(StepRates(step_seconds=0.1), decoding=4, prompt=prompt, seconds=0.35)
    assert rates.step_seconds == 0.1
    assert rates.prefill_tokens_per_second == pytest.approx(4 * prompt)


@pytest.mark.parametrize(("decoding", "prompt"), [(0, 127), (4, 31)])
def test_steps_of_little_prompt_count_for_neither(decoding: int, prompt: int) -> None:
    assert observed(StepRates(), decoding=decoding, prompt=prompt, seconds=0.05) == StepRates()


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.1000001])
def test_a_mixed_step_that_was_hardly_longer_than_others_moves_the_rate_by_a_tenth_of_its_time(seconds: float) -> None:
    rates = observed(StepRates(0.1, prefill_tokens_per_second=400.0), decoding=4, prompt=64, seconds=seconds)
    assert 1 / rates.prefill_tokens_per_second == pytest.approx(0.9 / 400 + 0.1 * (seconds / 4 / 64))


def test_beside_fewer_than_were_measured_a_long_prompt_seems_no_more_than_four_times_as_fast_as_its_steps() -> None:
    """Sixteen decoded, one does: until it decodes alone, nobody knows how much less of a step it takes."""
    rates = StepRates(step_seconds=0.2, prefill_tokens_per_second=400.0)
    for _ in range(200):
        observed(rates, decoding=1, prompt=64, seconds=0.15)
    assert rates.prefill_tokens_per_second == pytest.approx(4 * 64 / 0.15, rel=0.01)


def test_one_slow_step_moves_the_mean_by_a_tenth() -> None:
    rates = observed(StepRates(step_seconds=1.0), decoding=1, prompt=0, seconds=2.0)
    assert rates.step_seconds == pytest.approx(1.1)
    rates = observed(StepRates(prefill_tokens_per_second=256.0), decoding=0, prompt=256, seconds=2.0)
    assert 1 / rates.prefill_tokens_per_second == pytest.approx(1.1 / 256)


def test_a_mean_is_the_first_value_and_then_moves_by_a_tenth() -> None:
    mean = RecentMean()
    assert mean.value == 0
    mean.observe(1.0)
    assert mean.value == 1.0
    mean.observe(2.0)
    assert mean.value == pytest.approx(1.1)


def test_a_small_transfer_hardly_moves_a_speed_however_slow_it_was() -> None:
    speed = RecentSpeed()
    assert speed.per_second == 0
    speed.observe(1e9, 1.0)
    speed.observe(1e3, 0.001)  # all latency: a thousandth of the speed
    assert speed.per_second == pytest.approx(1e9, rel=0.01)


def test_a_speed_follows_a_link_that_became_slow() -> None:
    speed = RecentSpeed()
    for _ in range(10):
        speed.observe(1e9, 1.0)
    for _ in range(10):
        speed.observe(1e9, 10.0)
    assert speed.per_second < 0.25e9


@pytest.mark.parametrize(("amount", "seconds"), [(0, 1.0), (0, 0.0), (5, 0.0)])
def test_transfers_of_nothing_or_in_no_time_say_nothing(amount: float, seconds: float) -> None:
    speed = RecentSpeed()
    speed.observe(amount, seconds)
    assert speed.per_second == 0
    speed.observe(10, 2)
    speed.observe(amount, seconds)
    assert speed.per_second == 5
