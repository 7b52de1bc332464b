"""Speeds that routers rely on are measured on steps that mean something."""

from __future__ import annotations

import pytest

from alora_serve.engine.rates import StepRates


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
