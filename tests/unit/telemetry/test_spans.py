"""Spans are made inside recorded ones, say nothing of what was asked, and cost nothing where nobody records."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import INVALID_SPAN, Span

from alora_serve.telemetry import child_span, current, is_recorded, note, past_span, span, spans_by, tracer
from recorded_spans import Recorded, facts, failed, is_child, recording


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    with recording() as opened:
        yield opened


def root() -> Span:
    maker = tracer()
    assert maker is not None
    return maker.start_span("root")


def test_without_a_provider_every_span_is_the_no_op_and_nothing_is_asked_for() -> None:
    assert tracer() is None
    assert child_span("a") is INVALID_SPAN
    with span("b") as inner:
        assert inner is INVALID_SPAN
        assert not is_recorded()
        note(lambda: pytest.fail("nobody listens"))
        past_span("c", 0.0, 1.0)


def test_a_provider_is_forgotten_when_its_block_ends(recorded: Recorded) -> None:
    with recording():
        pass
    with current(root()) as outer, span("inner"):
        pass
    outer.end()
    assert recorded.names == ["root", "inner"]


def test_a_span_is_the_child_of_the_current_one_and_current_itself(recorded: Recorded) -> None:
    with current(root()) as outer:
        with span("a") as a:
            assert trace.get_current_span() is a
            note(lambda: {"alora.tokens.loaded": 3})
            child_span("b").end()
        assert trace.get_current_span() is outer
        child_span("c", {"alora.attempt": 1}, parent=outer).end()
    outer.end()
    assert is_child(recorded.one("a"), recorded.one("root"))
    assert is_child(recorded.one("b"), recorded.one("a"))
    assert is_child(recorded.one("c"), recorded.one("root"))
    assert facts(recorded.one("a")) == {"alora.tokens.loaded": 3}
    assert facts(recorded.one("c")) == {"alora.attempt": 1}


def test_a_failure_leaves_its_class_and_nothing_that_it_says(recorded: Recorded) -> None:
    with current(root()) as outer, pytest.raises(ValueError, match="diary"), span("a"):
        raise ValueError("my secret diary")
    outer.end()
    a = recorded.one("a")
    assert failed(a)
    assert facts(a) == {"error.type": "ValueError"}
    for ended in recorded.named(""):
        assert "diary" not in ended.to_json()


def test_what_is_over_becomes_a_span_of_the_time_it_took(recorded: Recorded) -> None:
    before = time.time_ns()
    with current(root()) as outer:
        now = time.monotonic()
        past_span("queue", now - 2.0, now - 0.5, {"alora.tokens.computed": 7})
        past_span("backwards", now, now - 1.0)
    outer.end()
    queue, backwards = recorded.one("queue"), recorded.one("backwards")
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert queue.end_time - queue.start_time == pytest.approx(1.5e9, abs=1e4)
    assert queue.start_time < before
    assert facts(queue) == {"alora.tokens.computed": 7}
    assert is_child(queue, recorded.one("root"))
    assert backwards.end_time == backwards.start_time, "a span ends no sooner than it began"


def test_what_is_not_sampled_makes_no_spans_but_keeps_its_trace() -> None:
    with recording() as recorded, spans_by(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)):
        with current(root()) as outer, span("a"):
            assert not is_recorded()
            with current(child_span("b")):
                assert trace.get_current_span() is outer, "peers learn not to sample either"
        assert recorded.names == []


def test_what_outlives_its_parent_is_not_told(recorded: Recorded) -> None:
    outer = root()
    outer.end()
    with current(outer), span("late"):
        past_span("later", 0.0, 1.0)
    assert recorded.names == ["root"]
