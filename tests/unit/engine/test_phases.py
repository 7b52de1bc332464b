"""Spans of what the engine did are made from the times that its sequences carry."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

import pytest

from alora_serve.engine.events import SequenceStats
from alora_serve.engine.phases import trace_sequence, trace_store_put
from alora_serve.kv.transfer import StoreResult
from alora_serve.telemetry import current
from recorded_spans import Recorded, facts, is_child, recording

STATS = SequenceStats(
    queue_seconds=1.0,
    prefill_seconds=2.0,
    first_token_seconds=3.0,
    decode_seconds=4.0,
    computed_tokens=11,
    generated_tokens=5,
)


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    with recording() as opened, current(opened.provider.get_tracer("test").start_span("call")) as call:
        yield opened
        call.end()
    assert all(is_child(span, opened.one("call")) for span in opened.named("") if span.name != "call")


def seconds(recorded: Recorded, name: str) -> float:
    span = recorded.one(name)
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_generation_waits_then_computes_then_decodes(recorded: Recorded) -> None:
    trace_sequence(monotonic() - 7.0, STATS)
    assert recorded.names == ["queue", "compute", "decode"]
    assert [seconds(recorded, name) for name in recorded.names] == pytest.approx([1.0, 2.0, 4.0], abs=1e-3)
    for earlier, later in (("queue", "compute"), ("compute", "decode")):
        ended, began = recorded.one(earlier).end_time, recorded.one(later).start_time
        assert ended == pytest.approx(began, abs=1e6)
    assert facts(recorded.one("compute")) == {"alora.tokens.computed": 11}
    assert facts(recorded.one("decode")) == {"gen_ai.usage.output_tokens": 5}


def test_a_prefill_decodes_nothing(recorded: Recorded) -> None:
    trace_sequence(monotonic() - 3.0, SequenceStats(1.0, 2.0, 3.0, 0.0, 11, 0))
    assert recorded.names == ["queue", "compute"]


def test_blocks_are_stored_in_one_span_however_many_they_are(recorded: Recorded) -> None:
    trace_store_put(monotonic() - 0.25, StoreResult(800, {"full": 2}))
    assert seconds(recorded, "store put") == pytest.approx(0.25, abs=0.1)
    assert facts(recorded.one("store put")) == {"alora.bytes.stored": 800, "alora.drops.full": 2}
