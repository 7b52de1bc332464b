"""A loop that hangs is told from one that is slow and from one that has nothing to do."""

from __future__ import annotations

import pytest

from alora_serve.engine import pulse
from alora_serve.engine.pulse import LEAST_SECONDS, TIMES_EXPECTED, Pulse
from alora_serve.engine.rates import StepRates

STEP_TOKENS = 256


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pulse, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lost_after(clock: Clock, beating: Pulse, seconds: float) -> bool:
    beating.turn()
    clock.now += seconds
    return beating.is_lost


def test_who_has_nothing_to_do_is_never_lost(clock: Clock) -> None:
    beating = Pulse(StepRates(), STEP_TOKENS)
    assert not beating.is_lost
    beating.turn()
    beating.rest()
    clock.now += 1e6
    assert not beating.is_lost


def test_who_turns_again_is_found(clock: Clock) -> None:
    beating = Pulse(StepRates(), STEP_TOKENS)
    assert not lost_after(clock, beating, LEAST_SECONDS - 1), "whose speed nobody measured"
    assert lost_after(clock, beating, LEAST_SECONDS + 1)
    beating.turn()
    assert not beating.is_lost


def test_the_longest_step_is_what_its_tokens_have_taken_lately() -> None:
    assert Pulse(StepRates(), STEP_TOKENS).longest_step_seconds == 0
    assert Pulse(StepRates(prefill_tokens_per_second=64.0), STEP_TOKENS).longest_step_seconds == 4


def test_how_long_it_is_lost_counts_from_when_it_is(clock: Clock) -> None:
    beating = Pulse(StepRates(prefill_tokens_per_second=1e6), STEP_TOKENS)
    assert beating.lost_seconds == 0
    assert not lost_after(clock, beating, LEAST_SECONDS - 1)
    assert beating.lost_seconds == 0
    clock.now += 31
    assert beating.lost_seconds == pytest.approx(30)
    beating.turn()
    assert beating.lost_seconds == 0


@pytest.mark.parametrize("step_seconds", [2.0, 30.0])
def test_a_slow_machine_may_take_as_long_as_it_is_slow(clock: Clock, step_seconds: float) -> None:
    beating = Pulse(StepRates(prefill_tokens_per_second=STEP_TOKENS / step_seconds), STEP_TOKENS)
    assert not lost_after(clock, beating, TIMES_EXPECTED * step_seconds - 1)
    assert lost_after(clock, beating, TIMES_EXPECTED * step_seconds + 1)


def test_a_fast_machine_may_be_busy_with_something_else(clock: Clock) -> None:
    beating = Pulse(StepRates(prefill_tokens_per_second=1e6), STEP_TOKENS)
    assert not lost_after(clock, beating, LEAST_SECONDS - 1)
    assert lost_after(clock, beating, LEAST_SECONDS + 1)
