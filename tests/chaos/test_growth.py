"""A leak of a few kilobytes a request is told from what looks at another moment differ by."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from faults.growth import MOST_BYTES_A_REQUEST, Footprint, bytes_a_request, growth

NOISE_BYTES = (0.0, 0.0, 2e6, -1e6, 1e6)
REQUESTS = (2_000, 4_000, 6_000, 8_000, 10_000)


def looks(a_request: float, *, at_first: float = 0.0) -> Sequence[Footprint]:
    """Of a process that grows so, and by something once before the second look."""
    return [
        Footprint(made, 3e8 + a_request * made + noise - (at_first if made == REQUESTS[0] else 0.0), 20, 10, 12)
        for made, noise in zip(REQUESTS, NOISE_BYTES, strict=True)
    ]


@pytest.mark.parametrize("at_first", [0.0, 50e6])
def test_what_looks_differ_by_and_what_is_filled_once_is_no_growth(at_first: float) -> None:
    assert growth("worker-1", looks(0.0, at_first=at_first), is_warm=True) == []


@pytest.mark.parametrize("a_request", [1_500.0, 5_000.0])
def test_a_leak_is_growth_once_all_is_in_use(a_request: float) -> None:
    leaking = looks(a_request)
    assert bytes_a_request(leaking) > MOST_BYTES_A_REQUEST
    [told] = growth("worker-1", leaking, is_warm=True)
    assert told.startswith("worker-1: ")
    assert growth("worker-1", leaking, is_warm=False) == []


@pytest.mark.parametrize("what", ["open_files", "threads", "tasks"])
def test_files_threads_and_tasks_that_are_left_are_growth(what: str) -> None:
    *before, last = looks(0.0)
    held = {name: getattr(last, name) for name in ("open_files", "threads", "tasks")}
    more = Footprint(last.requests, last.resident_bytes, **{**held, what: held[what] + 6})
    told = growth("router", [*before, more], is_warm=False)
    assert told == [f"router: {held[what]:.0f} to {held[what] + 6:.0f} {what}"]
