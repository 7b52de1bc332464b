"""What a request would wait for, of the figures that endpoints measured, and of those that they did not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_router.prediction import BATCH_DOUBLING, UNKNOWN_PACE, Pace, predict, typical_pace
from alora_serve.types import EndpointStatus
from fake_services import model

PACE = Pace(
    step_seconds=0.04,
    sequence_seconds=0.8,
    adapter_load_seconds=0.05,
    compute_token_seconds=0.001,
    fetch_token_seconds=1e-5,
)
IDLE: dict[str, Any] = {
    "load": 0,
    "places": 8,
    "pending_tokens": 0,
    "adapter_missing": False,
    "missing_tokens": 0,
    "computed_tokens": 0,
}
seconds = st.floats(0, 10)
paces = st.builds(Pace, *[st.sampled_from([0.0]) | st.floats(1e-6, 10)] * 5)
situations = st.fixed_dictionaries(
    {
        "load": st.integers(0, 100),
        "places": st.integers(0, 64),
        "pending_tokens": st.integers(0, 10_000),
        "adapter_missing": st.booleans(),
        "missing_tokens": st.integers(0, 10_000),
        "computed_tokens": st.integers(0, 10_000),
    }
)


def total(pace: Pace = PACE, **situation: Any) -> float:
    return sum(predict(pace, **{**IDLE, **situation}))


def test_an_idle_endpoint_that_has_everything_takes_one_step() -> None:
    assert total() == 0.04


@pytest.mark.parametrize(
    ("situation", "more_seconds"),
    [
        ({"load": BATCH_DOUBLING, "places": 32}, 0.04),
        ({"load": BATCH_DOUBLING, "places": 0}, 0.04),
        ({"pending_tokens": 300}, 0.3),
        ({"adapter_missing": True}, 0.05),
        ({"missing_tokens": 2000}, 0.02),
        ({"computed_tokens": 2000}, 2.0),
        ({"load": 8}, 0.02 + 0.8 / 8),
        ({"load": 10}, 0.025 + 3 * 0.8 / 8),
    ],
)
def test_each_cost_adds_its_measured_time(situation: dict[str, Any], more_seconds: float) -> None:
    assert total(**situation) == pytest.approx(0.04 + more_seconds)


def test_a_prefix_that_is_slower_to_fetch_than_to_compute_is_computed() -> None:
    slow_store = PACE._replace(fetch_token_seconds=0.1)
    assert total(slow_store, missing_tokens=100) == pytest.approx(0.04 + 0.1)


@pytest.mark.parametrize("known", ["fetch_token_seconds", "compute_token_seconds"])
def test_while_only_one_of_fetching_and_computing_is_measured_that_one_counts(known: str) -> None:
    assert total(UNKNOWN_PACE._replace(**{known: 0.5}), missing_tokens=3) == 1.5


@given(situations)
def test_what_nobody_measured_counts_for_nothing(situation: dict[str, Any]) -> None:
    assert total(UNKNOWN_PACE, **situation) == 0


@given(paces, situations, st.sampled_from(sorted(set(IDLE) - {"places"})), st.integers(0, 100))
def test_more_of_any_cost_never_predicts_less(pace: Pace, situation: dict[str, Any], grown: str, by: int) -> None:
    more = {**situation, grown: situation[grown] or bool(by) if grown == "adapter_missing" else situation[grown] + by}
    assert total(pace, **more) >= total(pace, **situation)


@given(paces, situations, st.sampled_from(Pace._fields), st.floats(1, 10))
def test_a_slower_figure_never_predicts_less(pace: Pace, situation: dict[str, Any], slower: str, times: float) -> None:
    assert total(pace._replace(**{slower: getattr(pace, slower) * times}), **situation) >= total(pace, **situation)


@given(st.lists(paces, min_size=1, max_size=5))
def test_an_unknown_figure_is_taken_to_be_like_the_others(known: list[Pace]) -> None:
    typical = typical_pace(known)
    for position, value in enumerate(typical):
        measured = [pace[position] for pace in known if pace[position]]
        assert bool(value) == bool(measured)
        assert not measured or min(measured) <= value * (1 + 1e-9)
        assert not measured or value <= max(measured) * (1 + 1e-9)
    assert UNKNOWN_PACE.filled(typical) == typical
    assert all(pace.filled(typical)[i] == value for pace in known for i, value in enumerate(pace) if value)


def test_a_report_becomes_seconds() -> None:
    status = EndpointStatus(
        model(),
        step_seconds=0.04,
        fetch_bytes_per_second=6400,
        prefill_tokens_per_second=500,
        adapter_load_seconds=0.2,
        sequence_seconds=0.9,
    )
    assert model().kv_bytes_per_token == 64
    assert Pace.of(status) == Pace(0.04, 0.9, 0.2, 0.002, 0.01)
    assert Pace.of(EndpointStatus(model())) == UNKNOWN_PACE
