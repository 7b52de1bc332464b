"""What is known of one endpoint: what it reported, and what was sent there since."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adapter_router.endpoints.endpoint import Endpoint
from adapter_router.policy import Demand
from adapter_router.prediction import Pace
from alora_serve.kv.fingerprints import STRIDE_TOKENS
from alora_serve.types import EndpointStatus, PrefixDigest
from fake_services import adapter, model

PREFIX = (11, 12, 13)
DEMAND = Demand(b"k", {model().model_digest}, "a", fingerprints=PREFIX, prefix_tokens=800, computed_tokens=40)
STATUS = EndpointStatus(
    model(),
    queued=2,
    running=3,
    max_running=8,
    step_seconds=0.5,
    adapters=(adapter("a"),),
    pending_prefill_tokens=100,
    resident_prefixes=PrefixDigest(STRIDE_TOKENS, frozenset(PREFIX[:1])),
)


@pytest.fixture
def endpoint() -> Endpoint[Any]:
    return Endpoint("10.0.0.1:1", None, None)  # type: ignore[arg-type]


def test_nothing_may_be_sent_to_it_before_its_first_report(endpoint: Endpoint[Any]) -> None:
    assert not endpoint.snapshot().healthy
    assert endpoint.state == "down"


def test_a_report_is_what_a_pick_sees(endpoint: Endpoint[Any]) -> None:
    endpoint.report(STATUS)
    seen = endpoint.snapshot()
    assert (seen.healthy, seen.reported_load, seen.load, seen.places, seen.pending_tokens) == (True, 5, 5, 8, 100)
    assert seen.pace == Pace(step_seconds=0.5)
    assert seen.lacks_adapter("a")
    assert seen.resident_tokens(PREFIX[::-1]) == STRIDE_TOKENS


def test_a_new_connection_to_it_goes_on_from_what_it_said_over_the_old_one(endpoint: Endpoint[Any]) -> None:
    anew = Endpoint[Any](endpoint.address, None, None)  # type: ignore[arg-type]
    anew.succeed(endpoint)
    assert not anew.snapshot().healthy, "it has not reported yet"
    endpoint.report(STATUS)
    anew.succeed(endpoint)
    assert anew.snapshot() == endpoint.snapshot()
    endpoint.healthy = False
    anew.succeed(endpoint)
    assert not anew.snapshot().healthy


def test_an_adapter_that_is_listed_twice_is_what_the_first_listing_says(endpoint: Endpoint[Any]) -> None:
    hidden = adapter("a", problem="/late/a is hidden by /early/a, of the same name")
    endpoint.report(replace(STATUS, adapters=(adapter("a"), hidden)))
    assert endpoint.snapshot().serves("a")


def test_what_is_sent_there_counts_at_once_and_its_prefix_and_adapter_are_on_their_way(endpoint: Endpoint[Any]) -> None:
    endpoint.report(STATUS)
    endpoint.take(DEMAND)
    seen = endpoint.snapshot()
    assert (seen.load, seen.pending_tokens) == (6, 140)
    assert not seen.lacks_adapter("a")
    assert seen.resident_tokens(PREFIX[::-1]) == 3 * STRIDE_TOKENS


def test_what_came_with_a_request_stays_known_until_a_report_after_its_end(endpoint: Endpoint[Any]) -> None:
    endpoint.report(STATUS)
    endpoint.take(DEMAND)
    endpoint.take(DEMAND)
    endpoint.give_back(DEMAND)
    endpoint.report(STATUS)
    assert endpoint.snapshot().resident_tokens(PREFIX[::-1]) == 3 * STRIDE_TOKENS, "another request holds it"
    assert endpoint.snapshot().pending_tokens == 100, "the report counts what was sent before it"
    endpoint.give_back(DEMAND)
    assert endpoint.snapshot().resident_tokens(PREFIX[::-1]) == 3 * STRIDE_TOKENS, "no report has come since"
    assert not endpoint.snapshot().lacks_adapter("a")
    endpoint.report(STATUS)
    assert endpoint.snapshot().resident_tokens(PREFIX[::-1]) == STRIDE_TOKENS
    assert endpoint.snapshot().lacks_adapter("a")
    assert endpoint.snapshot().load == 5


def test_tokens_that_are_only_guessed_count_once_a_conversation_until_they_are_reported_or_done(
    endpoint: Endpoint[Any],
) -> None:
    endpoint.report(STATUS)
    short, long, other = (
        Demand(key, {model().model_digest}, expected_tokens=tokens)
        for key, tokens in ((b"k", 30), (b"k", 50), (b"o", 7))
    )
    for demand in (short, long, other):
        endpoint.take(demand)
    seen = endpoint.snapshot()
    assert (seen.tokens_ahead(b"k"), seen.tokens_ahead(b"o"), seen.tokens_ahead(b"new")) == (107, 150, 157)
    endpoint.give_back(long)
    assert endpoint.snapshot().tokens_ahead(b"new") == 137
    endpoint.report(STATUS)
    assert endpoint.snapshot().tokens_ahead(b"new") == 100, "it may count them by now"
    endpoint.take(other)
    endpoint.give_back(short)
    assert endpoint.snapshot().tokens_ahead(b"new") == 107


def test_tokens_of_what_ended_before_a_report_are_no_longer_waited_for(endpoint: Endpoint[Any]) -> None:
    endpoint.report(STATUS)
    endpoint.take(DEMAND)
    endpoint.give_back(DEMAND)
    assert endpoint.snapshot().pending_tokens == 100


def test_a_digest_of_another_stride_says_nothing(endpoint: Endpoint[Any]) -> None:
    digest = PrefixDigest(STRIDE_TOKENS * 2, frozenset(PREFIX))
    endpoint.report(replace(STATUS, resident_prefixes=digest))
    assert endpoint.snapshot().resident_tokens(PREFIX[::-1]) == 0


@pytest.mark.parametrize(
    ("news", "matters"),
    [
        ({"running": 7, "step_seconds": 0.1, "resident_prefixes": PrefixDigest()}, False),
        ({"draining": True}, True),
        ({"adapters": ()}, True),
        ({"model": model("other")}, True),
    ],
)
def test_only_what_decides_who_may_be_sent_there_is_news(
    endpoint: Endpoint[Any], news: dict[str, Any], matters: bool
) -> None:
    assert endpoint.report(STATUS)
    assert endpoint.report(replace(STATUS, **news)) == matters
    endpoint.healthy = False
    assert endpoint.report(endpoint.status or STATUS), "it is back"


def test_a_snapshot_is_made_anew_only_after_a_change(endpoint: Endpoint[Any]) -> None:
    endpoint.report(STATUS)
    first = endpoint.snapshot()
    assert endpoint.snapshot() is first
    endpoint.healthy = False
    assert not endpoint.snapshot().healthy
    assert first.healthy
