"""One thread for what is done sooner than another thread wakes up.

With ``OMP_WAIT_POLICY=passive``, which the launcher sets so that processes on few cores do not spin against each other,
OpenMP's threads sleep between calls, and each call that uses them wakes them first. A decode step makes a hundred calls
that are over by then: they run on the calling thread alone.
"""

from __future__ import annotations

import os
from typing import Final

import torch

WAKE_SECONDS: Final = 100e-6
"""From a call to its threads at work, as measured: 50-130 us on two cores (docs/performance.md)."""

BYTES_PER_SECOND: Final = 12e9
MULTIPLICATIONS_PER_SECOND: Final = 30e9
"""What one core reads from memory and multiplies, roughly; where it matters little, it decides either way."""

_threads_sleep = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


class ThreadsFor:
    """As many threads as a call is worth while the ``with`` block runs: torch's own number, or one.

    Args:
        size_bytes: what the call reads.
        multiplications: what it computes.
    """

    __slots__ = ("_usual",)

    def __init__(self, size_bytes: float, multiplications: float) -> None:
        usual = torch.get_num_threads()
        alone_seconds = size_bytes / BYTES_PER_SECOND + multiplications / MULTIPLICATIONS_PER_SECOND
        few = _threads_sleep and usual > 1 and alone_seconds * (1 - 1 / usual) < WAKE_SECONDS
        self._usual = usual if few else 0

    def __enter__(self) -> None:
        if self._usual:
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        if self._usual:
            torch.set_num_threads(self._usual)
