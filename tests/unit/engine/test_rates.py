"""Speeds that routers rely on are measured on steps that mean something."""

from __future__ import annotations

import pytest

from alora_serve.engine.rates import RecentMean, RecentSpeed, StepRates


def test_steps_that_only_decode_give_the_step_time_and_nothing_else() -> None:
    rates = StepRates()
    rates.observe(sequences=4, tokens=4, budget_tokens=256, seconds=0.05)
    assert rates == StepRates(step_seconds=0.05)


def test_steps_that_are_mostly_prompt_give_the_prefill_rate() -> None:
    rates = StepRates()
    rates.observe(sequences=1, tokens=256, budget_tokens=256, seconds=0.5)
    assert rates == StepRates(prefill_tokens_per_second=512.0)


def test_mixed_steps_with_little_prompt_count_for_neither() -> None:
    rates = StepRates()
    rates.observe(sequences=4, tokens=20, budget_tokens=256, seconds=0.05)
    assert rates == StepRates()


def test_one_slow_step_moves_the_mean_by_a_tenth() -> None:
    rates = StepRates(step_seconds=1.0)
    rates.observe(sequences=1, tokens=1, budget_tokens=256, seconds=2.0)
    assert rates.step_seconds == pytest.approx(1.1)


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
