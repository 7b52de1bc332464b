"""KV is fetched unless computing has been measured to be faster, and then now and then all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from alora_serve.engine.fetch_decision import EARLY_PROBE_SECONDS, EARLY_SECONDS, PROBE_SECONDS, FetchDecision
from alora_serve.engine.rates import RecentSpeed

BYTES_PER_TOKEN = 1000


class Bench:
    def __init__(self, *, always: bool = False, bytes_per_token: int = BYTES_PER_TOKEN) -> None:
        self.now, self.fetched, self.compute_speed = 0.0, RecentSpeed(), 0.0
        self.counts: Counter[str] = Counter()
        self.decision = FetchDecision(
            bytes_per_token,
            self.fetched,
            lambda: self.compute_speed,
            self,
            always=always,
            clock=lambda: self.now,
        )

    @property
    def fetch_speed(self) -> float:
        return self.fetched.per_second

    @fetch_speed.setter
    def fetch_speed(self, per_second: float) -> None:
        self.fetched.forget()
        self.fetched.observe(per_second, 1.0)

    def fetch_decision(self, decision: str) -> None:
        self.counts[decision] += 1

    def measured_rates(self, fetch_bytes: Callable[[], float], prefill_tokens: Callable[[], float]) -> None:
        self.told = fetch_bytes, prefill_tokens


@pytest.mark.parametrize(("fetch_speed", "compute_speed"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1e9)])
def test_what_is_not_measured_favours_fetching(fetch_speed: float, compute_speed: float) -> None:
    bench = Bench()
    bench.fetch_speed, bench.compute_speed = fetch_speed, compute_speed
    assert bench.decision.should_fetch(100)
    assert bench.counts == {"fetch": 1}


@pytest.mark.parametrize(("bytes_per_second", "fetches"), [(499_000, False), (500_000, True), (1e9, True)])
def test_the_faster_way_is_taken(bytes_per_second: float, fetches: bool) -> None:
    bench = Bench()
    bench.fetch_speed, bench.compute_speed = bytes_per_second, 500.0
    assert bench.decision.should_fetch(64) is fetches
    assert bench.counts == {"fetch" if fetches else "compute": 1}


def test_what_decisions_are_made_from_is_told_as_it_changes() -> None:
    bench = Bench()
    assert [rate() for rate in bench.told] == [0, 0]
    bench.fetch_speed, bench.compute_speed = 1e9, 500.0
    assert [rate() for rate in bench.told] == [1e9, 500.0]


def test_where_it_is_wanted_a_slow_store_is_asked_all_the_same() -> None:
    bench = Bench(always=True)
    bench.fetch_speed, bench.compute_speed = 1.0, 500.0
    assert bench.decision.should_fetch(64)
    assert bench.counts == {"fetch": 1}


def test_a_slow_store_is_measured_again_soon_and_then_after_longer_whiles() -> None:
    bench = Bench()
    bench.fetch_speed, bench.compute_speed = 1.0, 500.0
    seen = []
    for second in range(71):
        bench.now = float(second)
        seen.append(bench.decision.should_fetch(64))
    probes = [second for second, fetched in enumerate(seen) if fetched]
    assert (EARLY_PROBE_SECONDS, EARLY_SECONDS, PROBE_SECONDS) == (5, 30, 15)
    assert probes == [5, 10, 15, 20, 25, 30, 45, 60]
    assert bench.counts == {"compute": len(seen) - len(probes), "probe": len(probes)}


def test_what_a_probe_found_counts_alone_and_everything_else_as_one_of_many() -> None:
    bench = Bench()
    bench.compute_speed = 500.0
    for _ in range(50):
        bench.decision.measured(10_000_000, 1.0)
    bench.decision.measured(10_000_000, 2.0)
    assert 5e6 < bench.fetch_speed < 10e6
    bench.decision.measured(10_000_000, 10_000.0)
    assert not bench.decision.should_fetch(64)
    bench.decision.measured(0, 1.0)  # nothing came: nothing is known
    assert 0 < bench.fetch_speed < 500_000
    bench.decision.measured(64_000, 0.01)
    assert bench.fetch_speed == 64_000 / 0.01
    assert bench.decision.should_fetch(64)


@pytest.mark.parametrize("in_flight", [4, 8])
@pytest.mark.parametrize("slow_bytes_per_second", [1e6, 5e6, 20e6])
def test_a_store_that_was_slow_for_five_seconds_is_in_use_again_within_ten(
    in_flight: int, slow_bytes_per_second: float
) -> None:
    """Fetches in flight share its bandwidth, each up to its time-out. What computing needs of it is 41 MB/s."""
    tokens, bytes_per_token, whole_bytes = 2048, 46_080, 2048 * 46_080
    bench = Bench(bytes_per_token=bytes_per_token)
    bench.compute_speed = 900.0

    def fetch(bytes_per_second: float) -> None:
        wanted = [bench.decision.should_fetch(tokens) for _ in range(in_flight)].count(True)
        seconds = min(0.5 + whole_bytes / 20e6, whole_bytes * max(wanted, 1) / bytes_per_second)
        bench.now += seconds if wanted else 0.5
        for _ in range(wanted):
            bench.decision.measured(round(bytes_per_second / wanted * seconds), seconds)

    for _ in range(50):
        bench.decision.measured(whole_bytes, whole_bytes / 500e6)
    while bench.now < 5:
        fetch(slow_bytes_per_second)
    assert bench.fetch_speed < bench.compute_speed * bytes_per_token
    ended_at = bench.now
    while bench.now < ended_at + 10:
        bench.counts.clear()
        fetch(500e6)
    assert bench.counts["fetch"] == in_flight
