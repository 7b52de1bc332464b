"""Wrappers around any store: one fails fast while the store is out of reach, the other records what was done."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from circuitbreaker import STATE_CLOSED, STATE_OPEN, CircuitBreaker

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.store import KVStore, Put, Sink, StoreKey

Operation = Literal["get", "contains", "put", "delete"]
Outcome = Literal["ok", "unavailable", "timeout", "full", "error", "caller"]
"""``caller`` is an exception of the caller's own sink or values; ``error`` anything else that the store reports."""

Direction = Literal["read", "write"]


class BreakerState(enum.Enum):
    """What a breaker does with the next call."""

    CLOSED = "closed"
    """Lets it through."""
    OPEN = "open"
    """Refuses it."""
    HALF_OPEN = "half_open"
    """Lets one through as a probe and refuses the others until it is back."""


class StoreMetrics(Protocol):
    """Where the wrappers report to. Called from many threads; must not raise."""

    def observe(self, operation: Operation, outcome: Outcome, seconds: float, bytes_moved: int) -> None:
        """One call of the store ended; ``bytes_moved`` were handed out or stored."""

    def breaker_state(self, direction: Direction, state: BreakerState) -> None:
        """The breaker of that direction is in this state now."""

    def breaker_retry(self, direction: Direction, seconds: Callable[[], float]) -> None:
        """Whenever asked, ``seconds`` tells how long that breaker stays open; 0 where it is not."""


class Breaker:
    """A circuit breaker that re-arms by time and lets one probe through.

    On top of the ``circuitbreaker`` library, which counts failures in a row and holds no lock during calls, but lets
    every waiting caller through at once when the time is up.
    """

    def __init__(self, failures_to_open: int, reset_seconds: float, report: Callable[[BreakerState], None]) -> None:
        self._circuit = CircuitBreaker(
            failure_threshold=failures_to_open,
            recovery_timeout=reset_seconds,
            expected_exception=(StoreUnavailableError, StoreTimeoutError),
        )
        self._reset_seconds = reset_seconds
        self._reopens_at = 0.0
        self._probing = threading.Lock()
        self._report = report
        report(BreakerState.CLOSED)

    @property
    def state(self) -> BreakerState:
        """What it would do with a call now."""
        return {STATE_CLOSED: BreakerState.CLOSED, STATE_OPEN: BreakerState.OPEN}.get(
            self._circuit.state, BreakerState.HALF_OPEN
        )

    @property
    def seconds_to_retry(self) -> float:
        """Seconds until an open breaker lets a probe through; 0 when it is not open."""
        return max(self._reopens_at - time.monotonic(), 0.0) if self.state is BreakerState.OPEN else 0.0

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the block, or raise ``StoreUnavailableError`` at once while open."""
        state = self.state
        if state is BreakerState.CLOSED:
            with self._counted():
                yield
        elif state is BreakerState.HALF_OPEN and self._probing.acquire(blocking=False):
            try:
                self._report(BreakerState.HALF_OPEN)
                with self._counted():
                    yield
            finally:
                self._probing.release()
        else:
            raise StoreUnavailableError(
                "the store failed repeatedly and is left alone for now", retry_after_seconds=self.seconds_to_retry
            )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        before = self._circuit.state
        try:
            with self._circuit:
                yield
        finally:
            if self._circuit.state == STATE_OPEN:
                self._reopens_at = time.monotonic() + self._reset_seconds
            if self._circuit.state != before:
                self._report(self.state)


class GuardedStore:
    """A :class:`~alora_serve.kv.store.KVStore` behind circuit breakers, one for reads and one for writes.

    Two, because a stopped process can block every writer of the LMDB store while reads go on. Only
    ``StoreUnavailableError`` and ``StoreTimeoutError`` of the store itself count; misses, a full store, other errors
    and whatever a sink raises show that the store is there. A call that is given no time says nothing of the store: it
    ends with ``StoreTimeoutError`` before it is asked.

    Args:
        inner: the store to guard; closed with this one.
        failures_to_open: failures in a row that open a breaker, >= 1.
        reset_seconds: time until an open breaker lets a probe through, > 0.
        metrics: told about every change of state.
    """

    def __init__(self, inner: KVStore, *, failures_to_open: int, reset_seconds: float, metrics: StoreMetrics) -> None:
        self._inner = inner
        self.reads = Breaker(failures_to_open, reset_seconds, lambda state: metrics.breaker_state("read", state))
        self.writes = Breaker(failures_to_open, reset_seconds, lambda state: metrics.breaker_state("write", state))
        metrics.breaker_retry("read", lambda: self.reads.seconds_to_retry)
        metrics.breaker_retry("write", lambda: self.writes.seconds_to_retry)

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        _require_time(timeout_seconds)
        watched = _WatchedSink(sink)
        sink_error: BaseException | None = None
        with self.reads.guard():
            try:
                self._inner.get_many(keys, watched, timeout_seconds=timeout_seconds)
            except BaseException as error:
                if not watched.raised(error):
                    raise
                sink_error = error
        if sink_error is not None:
            raise sink_error

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        _require_time(timeout_seconds)
        with self.reads.guard():
            return self._inner.contains_many(keys, timeout_seconds=timeout_seconds)

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        _require_time(timeout_seconds)
        with self.writes.guard():
            self._inner.put_many(puts, timeout_seconds=timeout_seconds)

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        _require_time(timeout_seconds)
        with self.writes.guard():
            self._inner.delete_many(keys, timeout_seconds=timeout_seconds)

    def close(self) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        self._inner.close()


class InstrumentedStore:
    """A :class:`~alora_serve.kv.store.KVStore` that reports every call to ``metrics``."""

    def __init__(self, inner: KVStore, metrics: StoreMetrics) -> None:
        self._inner = inner
        self._metrics = metrics

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        watched = _WatchedSink(sink)
        with self._observed("get", watched):
            self._inner.get_many(keys, watched, timeout_seconds=timeout_seconds)

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        with self._observed("contains"):
            return self._inner.contains_many(keys, timeout_seconds=timeout_seconds)

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        with self._observed("put", stored_bytes=sum(memoryview(put.value).nbytes for put in puts)):
            self._inner.put_many(puts, timeout_seconds=timeout_seconds)

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        with self._observed("delete"):
            self._inner.delete_many(keys, timeout_seconds=timeout_seconds)

    def close(self) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        self._inner.close()

    @contextmanager
    def _observed(
        self, operation: Operation, watched: _WatchedSink | None = None, stored_bytes: int = 0
    ) -> Iterator[None]:
        started = time.perf_counter()
        outcome: Outcome = "ok"
        try:
            yield
        except BaseException as error:
            outcome = "caller" if watched is not None and watched.raised(error) else _outcome(error)
            raise
        finally:
            moved_bytes = watched.handed_out_bytes if watched is not None else stored_bytes if outcome == "ok" else 0
            self._metrics.observe(operation, outcome, time.perf_counter() - started, moved_bytes)


class _WatchedSink:
    """Passes values on, counting their bytes and remembering which exceptions were the sink's own."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._lock = threading.Lock()  # stores may call from several threads
        self._errors: list[BaseException] = []
        self.handed_out_bytes = 0

    def __call__(self, index: int, value: memoryview) -> None:
        size = value.nbytes
        try:
            self._sink(index, value)
        except BaseException as error:
            self._errors.append(error)
            raise
        with self._lock:
            self.handed_out_bytes += size

    def raised(self, error: BaseException) -> bool:
        """Whether the sink raised exactly this exception."""
        return any(error is own for own in self._errors)


def _require_time(timeout_seconds: float) -> None:
    if timeout_seconds <= 0:
        raise StoreTimeoutError("no time was left to ask the store")


def _outcome(error: BaseException) -> Outcome:
    match error:
        case StoreUnavailableError():
            return "unavailable"
        case StoreTimeoutError():
            return "timeout"
        case StoreFullError():
            return "full"
        case StoreError():
            return "error"
    return "caller"
