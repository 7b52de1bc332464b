"""Tells a router that hangs from one that is slow: from its first sign of life on, one comes every second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from alora_serve.errors import UnavailableError
from alora_serve.v1 import alora_pb2


def shows_life(response: Any) -> bool:
    """Whether something follows within a second or so, whatever happens.

    Not before the first event of a worker, while the conversation is prefilled; nor from a router of an earlier version
    without heartbeats, which does not name the model either; nor between results of intrinsics.
    """
    if not isinstance(response, (alora_pb2.GenerateResponse, alora_pb2.FanOutResponse)):
        return False
    return response.event.HasField("heartbeat") or bool(response.event.started.model_digest)


def fell_silent(seconds: float) -> UnavailableError:
    """What a stream ends with on which nothing came for so long."""
    return UnavailableError(f"the router fell silent: nothing came from it for {seconds:g} s")


class SilenceWatch:
    """Cancels a call whose reader has waited too long. For threads; its own ends with :meth:`end`, or when it cancels.

    Args:
        seconds: how long is too long.
        cancel: ends the call, and with it the wait.
    """

    def __init__(self, seconds: float, cancel: Callable[[], object]) -> None:
        self.has_cancelled = False
        self._seconds = seconds
        self._cancel = cancel
        self._waiting_since = float("inf")
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="silence watch", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for the next response."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = float("inf")

    def end(self) -> None:
        """The call is over, or nobody reads it any more. Idempotent."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds / 4):
            if time.monotonic() - self._waiting_since >= self._seconds:
                self.has_cancelled = True
                self._cancel()
                return
