"""When a failed call is made again, and how long before."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass

from alora_serve.errors import AloraServeError, OverloadedError, RequestCancelledError, UnavailableError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Repeats calls that found nobody, and goes on with streams whose router was lost, from what was received.

    Attributes:
        max_attempts: most calls in all while nothing has come; None is as many as ``begin_seconds`` leave room for, and
            1 never repeats, nor goes on.
        begin_seconds: how long a call of which nothing has come looks for a router, from its first failure on.
        backoff_seconds: longest pause before the first repetition; doubles with each. Pauses are drawn from its half.
        max_backoff_seconds: where doubling ends.
        resume_seconds: how long a stream that has begun looks for a router to go on with.
        silence_seconds: a stream on which nothing came for so long, after a first sign of life, has lost its router,
            which sends one a second; None waits for the connection to break.
        retry_overloaded: also repeat calls refused for load, each time after as long as the server asked for, until
            their deadline or ``max_attempts``. A stream that has begun does so in any case, for ``resume_seconds``.
            A refusal that names no time, such as that of more than a whole quota, is never repeated.
    """

    max_attempts: int | None = None
    begin_seconds: float = 30.0
    backoff_seconds: float = 0.2
    max_backoff_seconds: float = 2.0
    resume_seconds: float = 30.0
    silence_seconds: float | None = 10.0
    retry_overloaded: bool = False


class Retries:
    """The attempts of one call, within its time. Call one of the ``wait_after`` for each failure."""

    def __init__(
        self, policy: RetryPolicy, timeout_seconds: float | None, closed: threading.Event | None = None
    ) -> None:
        """``closed`` is set once the client is: its calls are not made again."""
        self._policy = policy
        self._closed = closed or threading.Event()
        self._failures = 0
        self._num_tokens = 0
        self._until: float | None = None
        self._due_seconds = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def remaining_seconds(self) -> float | None:
        """Time left for the next attempt; None is without limit."""
        return None if self._due_seconds is None else max(0.0, self._due_seconds - time.monotonic())

    @property
    def silence_seconds(self) -> float | None:
        """See :class:`RetryPolicy`."""
        return self._policy.silence_seconds

    def received(self, num_tokens: int) -> None:
        """Say, when a call fails, how many tokens all have brought. With new ones, earlier failures do not count."""
        if num_tokens > self._num_tokens:
            self._num_tokens = num_tokens
            self._failures = 0
            self._until = None

    def wait_after(self, error: AloraServeError) -> None:
        """Return when the call is to be made again.

        Raises:
            AloraServeError: ``error``, when it is final.
            RequestCancelledError: the client was closed meanwhile.
        """
        if self._closed.wait(self.pause_after(error)):
            raise _closed_meanwhile() from error

    async def async_wait_after(self, error: AloraServeError) -> None:
        """As :meth:`wait_after`, for asyncio; told only after the pause that the client was closed."""
        await asyncio.sleep(self.pause_after(error))
        if self._closed.is_set():
            raise _closed_meanwhile() from error

    def pause_after(self, error: AloraServeError) -> float:
        """How many seconds to wait before calling again.

        Raises:
            AloraServeError: ``error``, when it is final.
        """
        self._failures += 1
        pause = self._pause_seconds(error)
        remaining = self.remaining_seconds()
        if pause is None or (remaining is not None and pause >= remaining):
            raise error
        return pause

    def _pause_seconds(self, error: AloraServeError) -> float | None:
        policy = self._policy
        # Who has read half of a stream is not sent away for a full queue: many come at once when a router is lost.
        waits_for_room = policy.retry_overloaded or self._num_tokens > 0
        has_room_later = isinstance(error, OverloadedError) and error.retry_after_seconds is not None
        if not isinstance(error, UnavailableError) and not (waits_for_room and has_room_later):
            return None
        if self._was_last():
            return None
        longest = min(policy.max_backoff_seconds, policy.backoff_seconds * 2.0 ** min(self._failures - 1, 30))
        pause = max(error.retry_after_seconds or 0.0, random.uniform(longest / 2, longest))
        if has_room_later and policy.retry_overloaded:  # a router has been found: should it be lost, time counts anew
            self._until = None
            return pause
        return None if self._is_over_after(pause) else pause

    def _was_last(self) -> bool:
        most = self._policy.max_attempts
        is_counted = most == 1 or not self._num_tokens
        return most is not None and is_counted and self._failures >= most

    def _is_over_after(self, pause_seconds: float) -> bool:
        policy, now = self._policy, time.monotonic()
        if self._until is None:
            self._until = now + (policy.resume_seconds if self._num_tokens else policy.begin_seconds)
        return now + pause_seconds >= self._until


def _closed_meanwhile() -> RequestCancelledError:
    return RequestCancelledError("the client was closed before the call could be made again")
