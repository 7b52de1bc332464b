"""When a breaker opens, when it does not, how it comes back, and what is reported of each call."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.guarded import BreakerState, GuardedStore, InstrumentedStore
from alora_serve.kv.store import KVStore, Put, Sink, StoreKey
from store_peer import RecordingMetrics, key_of

KEY = key_of("key")
FAILURES = 3


class ScriptedStore:
    """Fails as it is told, counts its calls, and may be made to wait."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.calls = 0
        self.closed = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.entered = threading.Event()

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        self._act()
        for index in range(len(keys)):
            sink(index, memoryview(b"value"))

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        self._act()
        return [False] * len(keys)

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        self._act()

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        self._act()

    def close(self) -> None:
        self.closed = True

    def _act(self) -> None:
        self.calls += 1
        self.entered.set()
        self.go_on.wait()
        if self.error is not None:
            raise self.error


class Clock:
    """Stands still until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("circuitbreaker.monotonic", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def inner() -> ScriptedStore:
    return ScriptedStore()


@pytest.fixture
def metrics() -> RecordingMetrics:
    return RecordingMetrics()


@pytest.fixture
def guarded(inner: ScriptedStore, metrics: RecordingMetrics) -> GuardedStore:
    return GuardedStore(inner, failures_to_open=FAILURES, reset_seconds=10, metrics=metrics)


def get(store: KVStore, sink: Sink = lambda *_: None) -> None:
    store.get_many([KEY, KEY], sink, timeout_seconds=1)


def fail(store: KVStore, inner: ScriptedStore, times: int, error: BaseException) -> None:
    inner.error = error
    for _ in range(times):
        with pytest.raises(type(error)):
            get(store)
    inner.error = None


@pytest.mark.parametrize("error", [StoreUnavailableError("gone"), StoreTimeoutError("slow")])
def test_failures_in_a_row_open_it_and_calls_then_fail_without_reaching_the_store(
    guarded: GuardedStore, inner: ScriptedStore, clock: Clock, error: StoreError
) -> None:
    fail(guarded, inner, FAILURES, error)
    assert guarded.reads.state is BreakerState.OPEN
    clock.now += 4
    with pytest.raises(StoreUnavailableError, match="left alone") as caught:
        get(guarded)
    assert inner.calls == FAILURES
    assert caught.value.retry_after_seconds == pytest.approx(6)
    assert guarded.reads.seconds_to_retry == pytest.approx(6)


def test_a_success_in_between_starts_the_count_again(guarded: GuardedStore, inner: ScriptedStore) -> None:
    for _ in range(3):
        fail(guarded, inner, FAILURES - 1, StoreTimeoutError("slow"))
        get(guarded)
    assert guarded.reads.state is BreakerState.CLOSED
    assert guarded.reads.seconds_to_retry == 0


@pytest.mark.parametrize("error", [StoreFullError("full"), StoreError("refused"), ValueError("a bug")])
def test_errors_of_a_store_that_answers_never_open_it(
    guarded: GuardedStore, inner: ScriptedStore, error: Exception
) -> None:
    fail(guarded, inner, 3 * FAILURES, error)
    assert guarded.reads.state is BreakerState.CLOSED


@pytest.mark.parametrize("error", [StoreTimeoutError("of another store"), ValueError("a bug")])
def test_a_sinks_own_errors_never_open_it_whatever_their_type(guarded: GuardedStore, error: Exception) -> None:
    def sink(index: int, value: memoryview) -> None:
        raise error

    for _ in range(3 * FAILURES):
        with pytest.raises(type(error)) as caught:
            get(guarded, sink)
        assert caught.value is error
    assert guarded.reads.state is BreakerState.CLOSED


def test_misses_never_open_it(guarded: GuardedStore) -> None:
    for _ in range(3 * FAILURES):
        assert guarded.contains_many([KEY], timeout_seconds=1) == [False]
    assert guarded.reads.state is BreakerState.CLOSED


def test_a_call_that_is_given_no_time_never_reaches_the_store_nor_opens_it(
    guarded: GuardedStore, inner: ScriptedStore
) -> None:
    inner.error = StoreTimeoutError("slow")
    for call in (
        lambda: guarded.get_many([KEY], lambda *_: None, timeout_seconds=0.0),
        lambda: guarded.contains_many([KEY], timeout_seconds=0.0),
        lambda: guarded.put_many([Put(KEY, b"value")], timeout_seconds=0.0),
        lambda: guarded.delete_many([KEY], timeout_seconds=-1.0),
    ):
        for _ in range(FAILURES):
            with pytest.raises(StoreTimeoutError, match="no time was left"):
                call()
    assert inner.calls == 0
    assert (guarded.writes.state, guarded.reads.state) == (BreakerState.CLOSED, BreakerState.CLOSED)


def test_blocked_writes_leave_reads_alone(guarded: GuardedStore, inner: ScriptedStore) -> None:
    inner.error = StoreTimeoutError("the writer lock is held")
    for _ in range(FAILURES):
        with pytest.raises(StoreTimeoutError):
            guarded.put_many([Put(KEY, b"value")], timeout_seconds=1)
    inner.error = None
    with pytest.raises(StoreUnavailableError):
        guarded.delete_many([KEY], timeout_seconds=1)
    assert (guarded.writes.state, guarded.reads.state) == (BreakerState.OPEN, BreakerState.CLOSED)
    get(guarded)


def test_it_re_arms_by_time_and_a_good_probe_closes_it(
    guarded: GuardedStore, inner: ScriptedStore, metrics: RecordingMetrics, clock: Clock
) -> None:
    fail(guarded, inner, FAILURES, StoreUnavailableError("gone"))
    clock.now += 10.1
    assert guarded.reads.state is BreakerState.HALF_OPEN
    get(guarded)
    assert guarded.reads.state is BreakerState.CLOSED
    states = [state for direction, state in metrics.states if direction == "read"]
    assert states == [BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.CLOSED]


def test_a_bad_probe_opens_it_for_another_term(guarded: GuardedStore, inner: ScriptedStore, clock: Clock) -> None:
    fail(guarded, inner, FAILURES, StoreUnavailableError("gone"))
    for _ in range(3):
        clock.now += 10.1
        calls = inner.calls
        fail(guarded, inner, 1, StoreUnavailableError("still gone"))
        with pytest.raises(StoreUnavailableError, match="left alone"):
            get(guarded)
        assert inner.calls == calls + 1
        assert guarded.reads.seconds_to_retry == pytest.approx(10)


def test_only_one_call_probes_and_the_others_fail_at_once(
    guarded: GuardedStore, inner: ScriptedStore, clock: Clock
) -> None:
    fail(guarded, inner, FAILURES, StoreUnavailableError("gone"))
    clock.now += 10.1
    inner.go_on.clear()
    inner.entered.clear()
    probe = threading.Thread(target=get, args=(guarded,))
    probe.start()
    inner.entered.wait()
    with pytest.raises(StoreUnavailableError, match="left alone"):
        get(guarded)
    inner.go_on.set()
    probe.join()
    assert guarded.reads.state is BreakerState.CLOSED
    assert inner.calls == FAILURES + 1


def test_calls_run_at_the_same_time(guarded: GuardedStore, inner: ScriptedStore) -> None:
    inner.go_on.clear()
    threads = [threading.Thread(target=get, args=(guarded,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while inner.calls < 2:  # would never be reached if the breaker held a lock during a call
        time.sleep(0.001)
    inner.go_on.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (StoreUnavailableError("gone"), "unavailable"),
        (StoreTimeoutError("slow"), "timeout"),
        (StoreFullError("full"), "full"),
        (StoreError("refused"), "error"),
        (TypeError("not a buffer"), "caller"),
    ],
)
def test_every_call_is_observed_with_its_outcome_and_bytes(
    inner: ScriptedStore, metrics: RecordingMetrics, error: Exception | None, outcome: str
) -> None:
    store = InstrumentedStore(inner, metrics)
    inner.error = error
    for call in (
        lambda: get(store),
        lambda: store.contains_many([KEY], timeout_seconds=1),
        lambda: store.put_many([Put(KEY, b"1234"), Put(KEY, memoryview(b"12"))], timeout_seconds=1),
        lambda: store.delete_many([KEY], timeout_seconds=1),
    ):
        if error is None:
            call()
        else:
            with pytest.raises(type(error)):
                call()
    done = error is None
    assert metrics.observed == [
        ("get", outcome, 10 if done else 0),
        ("contains", outcome, 0),
        ("put", outcome, 6 if done else 0),
        ("delete", outcome, 0),
    ]


def test_a_sinks_error_is_observed_as_the_callers_with_the_bytes_before_it(
    inner: ScriptedStore, metrics: RecordingMetrics
) -> None:
    def sink(index: int, value: memoryview) -> None:
        if index == 1:
            raise StoreTimeoutError("of another store")

    with pytest.raises(StoreTimeoutError):
        get(InstrumentedStore(inner, metrics), sink)
    assert metrics.observed == [("get", "caller", 5)]


def test_closing_a_wrapper_closes_the_store(inner: ScriptedStore, metrics: RecordingMetrics) -> None:
    InstrumentedStore(GuardedStore(inner, failures_to_open=1, reset_seconds=1, metrics=metrics), metrics).close()
    assert inner.closed
