"""How many requests an engine takes in: counted from arrival, before anything is loaded for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from alora_serve.errors import OverloadedError, UnavailableError

RETRY_AFTER_SECONDS = 1.0
"""What a client that found the queue full is told: about one short answer's time."""


class Places:
    """Places in batch and queue together. Thread-safe.

    Args:
        running: places in the batch.
        waiting: places in the queue.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._limit = running + waiting
        self._waiting = waiting
        self._taken = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Places held now."""
        return self._taken

    @contextmanager
    def hold(self) -> Iterator[None]:
        """One place while the block runs. Taken before a prefix is loaded, so that a burst cannot fill memory.

        Raises:
            OverloadedError: all places are taken; says when to retry.
            UnavailableError: closed.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("the engine is shutting down; ask another endpoint")
            if self._taken >= self._limit:
                raise OverloadedError(
                    f"{self._waiting} requests wait already; retry later or on another endpoint",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1

    def close(self) -> None:
        """No further place is given."""
        with self._lock:
            self._closed = True
