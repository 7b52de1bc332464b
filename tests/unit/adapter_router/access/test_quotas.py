"""Tenants use what they may, and one that may not is told which quota it met, and when to come back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_router.access.quotas import Bucket, Quotas
from adapter_router.access.rules import AccessRules, Quota
from alora_serve.errors import OverloadedError
from alora_serve.types import Usage


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def quotas(clock: Clock | None = None, **limits: int) -> Quotas:
    rules = AccessRules(tenants={"acme": Quota(**limits)})
    return Quotas(lambda: rules, clock or Clock())


def test_sequences_and_prompt_tokens_at_once_are_bounded() -> None:
    held = quotas(max_sequences=3, max_queued_tokens=100)
    with ExitStack() as stack:
        stack.enter_context(held.hold("acme", sequences=2, prompt_tokens=60))
        with pytest.raises(OverloadedError, match="max_sequences of 3: 2 in use, 2 asked for") as caught:
            stack.enter_context(held.hold("acme", sequences=2, prompt_tokens=0))
        assert caught.value.retry_after_seconds
        with pytest.raises(OverloadedError, match="max_queued_tokens"):
            stack.enter_context(held.hold("acme", sequences=1, prompt_tokens=41))
        stack.enter_context(held.hold("other", sequences=50, prompt_tokens=10_000))
    with held.hold("acme", sequences=3, prompt_tokens=100):
        pass


def test_the_default_is_of_tenants_without_an_entry_and_of_what_an_entry_does_not_say() -> None:
    limits = {"default": {"max_sequences": 2}, "tenants": {"bare": None, "own": {"tokens_per_minute": 600}}}
    lifted = {"more": {"max_sequences": 5}, "free": {"max_sequences": None}}
    rules = AccessRules.model_validate({**limits, "tenants": {**limits["tenants"], **lifted}})
    held = Quotas(lambda: rules, Clock())
    for tenant in ("of a JWT", "bare", "own"):
        with held.hold(tenant, sequences=2, prompt_tokens=0):
            pass
        with (
            pytest.raises(OverloadedError, match="max_sequences of 2"),
            held.hold(tenant, sequences=3, prompt_tokens=0),
        ):
            pytest.fail("the default was not held to")
    for tenant, sequences in (("more", 5), ("free", 1000)):
        with held.hold(tenant, sequences=sequences, prompt_tokens=0):
            pass
    assert rules.quota_of("own").tokens_per_minute == 600
    assert rules.quota_of("of a JWT").tokens_per_minute is None


def test_what_never_fits_is_not_to_be_retried() -> None:
    with pytest.raises(OverloadedError) as caught, quotas(max_sequences=3).hold("acme", sequences=4, prompt_tokens=0):
        pytest.fail("it was let in")
    assert caught.value.retry_after_seconds is None


def test_a_request_that_fails_gives_back_what_it_held() -> None:
    held = quotas(max_sequences=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), held.hold("acme", sequences=1, prompt_tokens=5):
            raise ZeroDivisionError


def test_tokens_a_minute_are_charged_when_known_and_come_back_with_time() -> None:
    clock = Clock()
    held = quotas(clock, tokens_per_minute=600)
    with held.hold("acme", sequences=1, prompt_tokens=0):
        held.charge("acme", Usage(2000, cached_tokens=1000, computed_tokens=1000, generated_tokens=200))
    with (
        pytest.raises(OverloadedError, match="tokens_per_minute") as caught,
        held.hold("acme", sequences=1, prompt_tokens=0),
    ):
        pytest.fail("it was let in")
    wait = caught.value.retry_after_seconds
    assert wait == pytest.approx(60.1)
    clock.now += wait
    with held.hold("acme", sequences=1, prompt_tokens=0):
        pass


def test_stored_bytes_are_a_matter_of_storing_and_not_of_answering() -> None:
    clock = Clock()
    held = quotas(clock, stored_bytes_per_day=1000)
    assert held.may_store("acme")
    held.charge("acme", Usage(1, stored_bytes=1500))
    assert not held.may_store("acme")
    with held.hold("acme", sequences=1, prompt_tokens=0):
        pass
    clock.now += 86_400
    assert held.may_store("acme")


def test_a_tenant_without_an_entry_and_no_tenant_at_all_are_without_limit() -> None:
    held = quotas(max_sequences=1)
    for tenant in ("", "other"):
        with held.hold(tenant, sequences=1000, prompt_tokens=10**9):
            held.charge(tenant, Usage(1, computed_tokens=10**9, stored_bytes=10**12))
        assert held.may_store(tenant)


def test_a_tenant_that_has_used_nothing_for_long_takes_no_memory() -> None:
    """The issuer of JWTs may know any number of them."""
    clock = Clock()
    rules = AccessRules(default=Quota(tokens_per_minute=600, stored_bytes_per_day=1000))
    held = Quotas(lambda: rules, clock)
    for number in range(20_000):
        clock.now += 10.0
        held.charge(f"tenant-{number}", Usage(1, generated_tokens=600, stored_bytes=100))
    assert len(held._buckets) < 5_000
    with pytest.raises(OverloadedError), held.hold("tenant-19999", sequences=1, prompt_tokens=0):
        pytest.fail("what it has used was forgotten")


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 30)), max_size=40))
def test_a_bucket_never_gives_more_than_its_amount_and_what_came_in_since(steps: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket = Bucket(100.0, 10.0, clock)
    used, began = 0.0, clock.now
    for amount, seconds in steps:
        clock.now += seconds
        if not bucket.seconds_until_open():
            bucket.take(amount)
            used += amount
        assert used <= 100.0 + 10.0 * (clock.now - began) + 50.0  # the last one may overdraw
