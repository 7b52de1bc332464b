"""What a target is, and how much it may allocate."""

from __future__ import annotations

import resource
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ALLOCATION_BYTES: Final = 256 << 20
"""What a parser of a few kilobytes may have allocated at any moment."""


@dataclass(frozen=True, slots=True)
class Target:
    """One parser.

    Attributes:
        parse: what it does with bytes.
        seeds: bytes that it takes, to begin from.
        stack_bytes: addresses that stacks of its threads have beside, of which they use a little.
    """

    parse: Callable[[bytes], None]
    seeds: Sequence[bytes]
    stack_bytes: int = 0

    def run(self, data: bytes) -> None:
        """Parse, within :data:`ALLOCATION_BYTES`.

        Raises:
            AssertionError: it took what it must not, or too much memory.
            Exception: whatever the parser let through.
        """
        with within(ALLOCATION_BYTES, self.stack_bytes):
            self.parse(data)


@contextmanager
def within(limit_bytes: int, stack_bytes: int = 0) -> Iterator[None]:
    """Hold the block to so much more memory than there is now, and addresses of stacks.

    What Python and NumPy allocate is counted at its peak, however it ended. Whatever else asks the system for more is
    refused it, where the system can do that (Linux), which fails in its own way.

    Raises:
        AssertionError: Python's objects took more.
    """
    is_traced = tracemalloc.is_tracing()
    if not is_traced:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with _address_space(limit_bytes + stack_bytes):
            yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        if not is_traced:
            tracemalloc.stop()
        must(peak <= limit_bytes, f"{peak} bytes were allocated, {limit_bytes} may be")


@contextmanager
def _address_space(more_bytes: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + more_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def must(holds: bool, why: str) -> None:
    """As ``assert``, whatever Python's options are.

    Raises:
        AssertionError: it does not hold.
    """
    if not holds:
        raise AssertionError(why)
