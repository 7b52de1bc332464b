"""What a generation cost, in the line that people get."""

from __future__ import annotations

from alora_serve.cli.commands.generation import _cost
from alora_serve.types import Timings, Usage

TIMINGS = Timings(first_token_seconds=0.25, total_seconds=0.5)


def test_a_worker_that_fetched_what_was_just_computed_is_told_apart_from_one_that_found_it() -> None:
    fresh = Usage(prompt_tokens=37, computed_tokens=37, generated_tokens=2, fetched_bytes=3 << 20, stored_bytes=4 << 20)
    assert _cost(fresh, TIMINGS) == (
        "37 prompt tokens: 0 cached, 37 computed; 4,096 KiB stored, 3,072 KiB of it fetched; "
        "2 generated, first after 0.250 s; 0.500 s in all"
    )
    found = Usage(prompt_tokens=37, cached_tokens=30, computed_tokens=7, fetched_bytes=3 << 20, stored_bytes=1 << 20)
    assert "; 1,024 KiB stored, 3,072 KiB fetched; " in _cost(found, TIMINGS)


def test_blocks_that_the_store_did_not_give_or_take_are_counted_by_reason() -> None:
    usage = Usage(store_misses={"absent": 7, "corrupt": 1, "timeout": 2}, store_drops={"full": 1})
    told = _cost(usage, TIMINGS)
    assert told.endswith("; 1 block not fetched: corrupt; 2 blocks not fetched: timeout; 1 block not stored: full")
    assert "absent" not in told
