"""How many requests an engine takes in: counted from arrival, before anything is loaded for them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from alora_serve.errors import OverloadedError, UnavailableError

RETRY_AFTER_SECONDS = 1.0
"""What a client that found the queue full is told: about one short answer's time."""


class Places:
    """Places in batch and queue together. Thread-safe.

    Args:
        running: places in the batch, and as many beyond the queue for streams that began elsewhere.
        waiting: places in the queue.
        tenant_share: how much of all places one tenant may hold; those of no tenant may hold all.
    """

    def __init__(self, running: int, waiting: int, tenant_share: float = 1.0) -> None:
        self._limit = running + waiting
        self._surplus = running
        self._tenant_share = tenant_share
        self._held: Counter[str] = Counter()
        self._waiting = waiting
        self._taken = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Places held now."""
        return self._taken

    @contextmanager
    def hold(self, tenant: str = "", *, is_begun: bool = False, is_taken_over: bool = False) -> Iterator[None]:
        """One place while the block runs. Taken before a prefix is loaded, so that a burst cannot fill memory.

        A stream that has begun elsewhere (``is_begun``) finds room for a batch more, of which its tenant may have its
        share: what a lost router's clients were reading. It is they who say so, hence the bound. One that our router
        has from a worker it lost (``is_taken_over``) is never refused: there are as many as that worker had places.

        Raises:
            OverloadedError: all places are taken, or all that one tenant may have; says when to retry.
            UnavailableError: closed.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("the engine is shutting down; ask another endpoint")
            limit = self._limit + self._surplus if is_begun else self._limit
            if self._taken >= limit and not is_taken_over:
                raise OverloadedError(
                    f"{self._waiting} requests wait already; retry later or on another endpoint",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            if tenant and self._held[tenant] >= max(1, int(limit * self._tenant_share)) and not is_taken_over:
                raise OverloadedError(
                    f"{self._held[tenant]} requests of this tenant are here already; retry later",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            self._taken += 1
            self._held[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1
                self._held[tenant] -= 1
                if not self._held[tenant]:
                    del self._held[tenant]

    def close(self) -> None:
        """No further place is given."""
        with self._lock:
            self._closed = True
