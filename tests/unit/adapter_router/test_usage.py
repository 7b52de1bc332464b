"""Figures of one request, added up over the two services that worked on it."""

from __future__ import annotations

from adapter_router.usage import merged_timings, merged_usage
from alora_serve.types import PrefillResult, Timings, Usage
from fake_services import handle


def prefilled(usage: Usage, timings: Timings | None = None) -> PrefillResult:
    return PrefillResult(handle(), usage, timings or Timings())


def test_what_prefill_computed_is_not_cached_though_the_worker_fetched_it() -> None:
    prefill = prefilled(Usage(100, cached_tokens=60, computed_tokens=40, stored_bytes=400, fetched_bytes=600))
    decode = Usage(
        110, cached_tokens=100, fetched_tokens=100, computed_tokens=10, fetched_bytes=1000, invocation_start=104
    )
    merged = merged_usage(prefill, decode)
    assert merged == Usage(
        110,
        cached_tokens=60,
        fetched_tokens=60,
        computed_tokens=50,
        fetched_bytes=1600,
        stored_bytes=400,
        invocation_start=104,
    )


def test_tokens_computed_twice_for_want_of_a_store_count_twice_and_none_is_cached() -> None:
    merged = merged_usage(prefilled(Usage(100, computed_tokens=100)), Usage(110, computed_tokens=110))
    assert merged.computed_tokens == 210
    assert merged.cached_tokens == 0


def test_misses_and_drops_are_summed_by_reason() -> None:
    prefill = prefilled(Usage(store_misses={"absent": 1, "corrupt": 2}, store_drops={"full": 3}))
    merged = merged_usage(prefill, Usage(store_misses={"absent": 4}, store_drops={"timeout": 5}))
    assert merged.store_misses == {"absent": 5, "corrupt": 2}
    assert merged.store_drops == {"full": 3, "timeout": 5}


def test_without_a_prefill_the_workers_figures_stand() -> None:
    decode = Usage(10, cached_tokens=9, computed_tokens=1)
    assert merged_usage(None, decode) == decode
    merged = merged_timings(None, Timings(1, 2, 3, 4, 5, 6, 7), first_token_seconds=8, total_seconds=9)
    assert merged == Timings(1, 2, 3, 4, 8, 6, 9)


def test_phases_are_summed_and_ends_are_the_routers() -> None:
    prefill = prefilled(Usage(), Timings(queue_seconds=1, fetch_seconds=2, prefill_seconds=3, total_seconds=99))
    merged = merged_timings(prefill, Timings(10, 20, 30, 40, 50, 60, 70), first_token_seconds=8, total_seconds=9)
    assert merged == Timings(11, 22, 33, 40, 8, 60, 9)
