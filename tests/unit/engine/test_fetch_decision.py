"""KV is fetched unless computing has been measured to be faster, and then now and then all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from alora_serve.engine.fetch_decision import PROBE_SECONDS, FetchDecision

BYTES_PER_TOKEN = 1000


class Bench:
    def __init__(self, *, always: bool = False) -> None:
        self.now, self.fetch_speed, self.compute_speed = 0.0, 0.0, 0.0
        self.counts: Counter[str] = Counter()
        self.decision = FetchDecision(
            BYTES_PER_TOKEN,
            lambda: self.fetch_speed,
            lambda: self.compute_speed,
            self,
            always=always,
            clock=lambda: self.now,
        )

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


def test_a_slow_store_is_measured_again_after_a_while() -> None:
    bench = Bench()
    bench.fetch_speed, bench.compute_speed = 1.0, 500.0
    seen = []
    for second in range(int(2 * PROBE_SECONDS) + 1):
        bench.now = float(second)
        seen.append(bench.decision.should_fetch(64))
    assert [second for second, fetched in enumerate(seen) if fetched] == [PROBE_SECONDS, 2 * PROBE_SECONDS]
    assert bench.counts == {"compute": len(seen) - 2, "probe": 2}
