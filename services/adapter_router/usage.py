"""Adds up what base prefill and a decode worker report for one request. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from alora_serve.types import PrefillResult, Timings, Usage


def merged_usage(prefill: PrefillResult | None, decode: Usage) -> Usage:
    """Usage of the whole request.

    A prompt token counts as computed for each service that ran it, so after a lost store both may have; cached is what
    none had to run, and fetched is what of it the worker had from the store: tokens that it fetched because prefill had
    just computed and stored them are computed ones. ``prompt_tokens`` and ``invocation_start`` are the worker's.

    Args:
        prefill: what preparing the conversation cost; None when nothing was prepared for this request.
        decode: the worker's usage.
    """
    if prefill is None:
        return decode
    computed = prefill.usage.computed_tokens + decode.computed_tokens
    cached = max(0, decode.prompt_tokens - computed)
    return replace(
        decode,
        cached_tokens=cached,
        fetched_tokens=min(decode.fetched_tokens, cached),
        computed_tokens=computed,
        fetched_bytes=prefill.usage.fetched_bytes + decode.fetched_bytes,
        stored_bytes=prefill.usage.stored_bytes + decode.stored_bytes,
        store_misses=_added(prefill.usage.store_misses, decode.store_misses),
        store_drops=_added(prefill.usage.store_drops, decode.store_drops),
    )


def merged_timings(
    prefill: PrefillResult | None, decode: Timings, *, first_token_seconds: float, total_seconds: float
) -> Timings:
    """Timings of the whole request; the last two as the router measured them from the request's arrival."""
    before = prefill.timings if prefill is not None else Timings()
    return replace(
        decode,
        queue_seconds=before.queue_seconds + decode.queue_seconds,
        fetch_seconds=before.fetch_seconds + decode.fetch_seconds,
        prefill_seconds=before.prefill_seconds + decode.prefill_seconds,
        first_token_seconds=first_token_seconds,
        total_seconds=total_seconds,
    )


def _added(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return dict(Counter(left) + Counter(right))
