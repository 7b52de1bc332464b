"""When a failed call is made again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from alora_serve.client.retry import Retries, RetryPolicy
from alora_serve.errors import AloraServeError, InvalidRequestError, OverloadedError, UnavailableError
from alora_serve.rpc.status import MessageTooLargeError

GONE = UnavailableError("gone")
FULL = OverloadedError("full", retry_after_seconds=1.5)


def test_pauses_double_up_to_a_limit_and_end_with_the_attempts() -> None:
    retries = Retries(RetryPolicy(max_attempts=6, backoff_seconds=0.2, max_backoff_seconds=1.0), None)
    pauses = [retries.pause_after(GONE) for _ in range(5)]
    for pause, longest in zip(pauses, (0.2, 0.4, 0.8, 1.0, 1.0), strict=True):
        assert longest / 2 <= pause <= longest
    with pytest.raises(UnavailableError):
        retries.pause_after(GONE)


def test_a_call_of_which_nothing_has_come_is_repeated_by_time_from_its_first_failure_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("alora_serve.client.retry.time", SimpleNamespace(monotonic=lambda: now))
    retries = Retries(RetryPolicy(), None)
    now += 500.0  # it ran so long before its router was lost
    assert max(retries.pause_after(GONE) for _ in range(50)) <= 2.0
    now += 27.9
    retries.pause_after(GONE)
    now += 2.1
    with pytest.raises(UnavailableError):
        retries.pause_after(GONE)


def test_the_deadline_ends_repetitions_before_their_time_is_over() -> None:
    with pytest.raises(UnavailableError):
        Retries(RetryPolicy(begin_seconds=60.0, backoff_seconds=2.0), 0.5).pause_after(GONE)


@pytest.mark.parametrize("error", [FULL, InvalidRequestError("bad"), AloraServeError("bug")])
def test_only_what_found_nobody_is_repeated(error: AloraServeError) -> None:
    with pytest.raises(type(error)):
        Retries(RetryPolicy(), None).pause_after(error)


def test_overload_is_repeated_when_asked_for_and_not_before_the_server_said() -> None:
    assert Retries(RetryPolicy(retry_overloaded=True), None).pause_after(FULL) >= 1.5


def test_overload_is_waited_out_as_long_as_the_server_asks_whatever_time_a_lost_router_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("alora_serve.client.retry.time", SimpleNamespace(monotonic=lambda: now))
    used_up = OverloadedError("quota tokens_per_minute is used up", retry_after_seconds=59.0)
    retries = Retries(RetryPolicy(retry_overloaded=True, max_attempts=9), None)
    retries.pause_after(GONE)
    for _ in range(3):
        assert retries.pause_after(used_up) == 59.0
        now += 59.0
    assert retries.pause_after(GONE) <= 2.0, "a router that was found and lost is looked for as long as any"
    begun = Retries(RetryPolicy(retry_overloaded=True), None)
    begun.received(1)
    assert begun.pause_after(used_up) == 59.0
    for _ in range(3):
        retries.pause_after(used_up)
    with pytest.raises(OverloadedError):  # the ninth attempt was the last
        retries.pause_after(used_up)


def test_what_never_fits_is_never_repeated() -> None:
    never = OverloadedError("quota max_sequences of 2: 0 in use, 3 asked for")
    for num_tokens in (0, 1):
        retries = Retries(RetryPolicy(retry_overloaded=True), None)
        retries.received(num_tokens)
        with pytest.raises(OverloadedError):
            retries.pause_after(never)


@pytest.mark.parametrize("error", [InvalidRequestError("large"), MessageTooLargeError("larger")])
def test_what_is_too_large_is_never_repeated(error: AloraServeError) -> None:
    with pytest.raises(type(error)):
        Retries(RetryPolicy(retry_overloaded=True), None).pause_after(error)


def test_nothing_is_repeated_that_would_begin_too_late() -> None:
    retries = Retries(RetryPolicy(retry_overloaded=True), 1.0)
    with pytest.raises(OverloadedError):
        retries.pause_after(FULL)
    assert 0 < (retries.remaining_seconds() or 0) <= 1.0
    assert Retries(RetryPolicy(), None).remaining_seconds() is None


def test_one_attempt_never_repeats() -> None:
    retries = Retries(RetryPolicy(max_attempts=1), None)
    retries.received(1)
    with pytest.raises(UnavailableError):
        retries.pause_after(GONE)


def test_a_stream_that_has_begun_looks_for_a_router_by_time_and_not_by_attempts() -> None:
    retries = Retries(RetryPolicy(max_attempts=2, begin_seconds=0, resume_seconds=60, max_backoff_seconds=0.5), None)
    retries.received(1)
    assert max(retries.pause_after(GONE) for _ in range(50)) <= 0.5
    too_late = Retries(RetryPolicy(resume_seconds=0.0), None)
    too_late.received(1)
    with pytest.raises(UnavailableError):
        too_late.pause_after(GONE)


def test_a_stream_that_has_begun_waits_for_room_as_long_as_for_a_router() -> None:
    retries = Retries(RetryPolicy(resume_seconds=60.0), None)
    retries.received(1)
    assert retries.pause_after(FULL) >= 1.5
    with pytest.raises(OverloadedError):
        retries.pause_after(OverloadedError("full", retry_after_seconds=60.0))


def test_only_more_tokens_than_before_begin_the_count_anew() -> None:
    retries = Retries(RetryPolicy(resume_seconds=0.0), None)
    retries.received(0)
    assert retries.pause_after(GONE) >= 0, "nothing came: it has its time to begin"
    retries.received(3)
    retries.received(3)
    with pytest.raises(UnavailableError):
        retries.pause_after(GONE)
