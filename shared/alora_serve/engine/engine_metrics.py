"""What the engine counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class EngineMetrics(Protocol):
    """Implemented in ``metrics/``."""

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        """One forward pass over so many sequences and tokens."""

    def load(self, running: int, waiting: int, tail_bytes: int) -> None:
        """Sequences in the batch and waiting for a place, and the bytes of their private KV."""

    def queued_prefill_tokens(self, tokens: Callable[[], int]) -> None:
        """Whenever asked, from any thread, ``tokens`` tells how many prompt tokens have not run yet."""
