"""A burst beyond batch and queue is turned away at the door, with a time to come back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from alora_serve.engine.places import RETRY_AFTER_SECONDS, Places
from alora_serve.errors import OverloadedError, UnavailableError


def test_places_of_batch_and_queue_are_given_and_no_more() -> None:
    places = Places(running=2, waiting=3)
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(places.hold())
        with pytest.raises(OverloadedError) as refused, places.hold():
            pytest.fail("a sixth place was given")
        assert refused.value.retry_after_seconds == RETRY_AFTER_SECONDS
    with places.hold():
        pass


def test_a_place_comes_back_when_its_holder_fails() -> None:
    places = Places(running=1, waiting=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), places.hold():
            raise ZeroDivisionError


def test_a_closed_engine_gives_no_place() -> None:
    places = Places(running=1, waiting=0)
    places.close()
    with pytest.raises(UnavailableError), places.hold():
        pytest.fail("a closed engine took a request in")


def test_streams_that_have_begun_elsewhere_find_a_batch_more_and_nothing_new_does() -> None:
    places = Places(running=2, waiting=1)
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(places.hold(is_begun=True))
        with pytest.raises(OverloadedError), places.hold(is_begun=True):
            pytest.fail("a sixth place was given")
        with pytest.raises(OverloadedError), places.hold():
            pytest.fail("a new one was taken in")
    assert places.taken == 0


def test_what_was_taken_over_from_a_lost_worker_is_never_refused_for_load() -> None:
    places = Places(running=1, waiting=0, tenant_share=0.75)
    with ExitStack() as held:
        for _ in range(9):
            held.enter_context(places.hold("acme", is_begun=True, is_taken_over=True))
        with pytest.raises(OverloadedError), places.hold("acme", is_begun=True):
            pytest.fail("its client's word was taken for the router's")
    assert places.taken == 0


def test_a_tenant_that_says_everything_has_begun_leaves_room_for_others() -> None:
    places = Places(running=8, waiting=32, tenant_share=0.75)
    with ExitStack() as held:
        for _ in range(36):  # three quarters of queue and two batches
            held.enter_context(places.hold("acme", is_begun=True))
        with pytest.raises(OverloadedError, match="of this tenant"), places.hold("acme", is_begun=True):
            pytest.fail("more than its share was given")
        for _ in range(4):
            held.enter_context(places.hold("beta"))


def test_one_tenant_leaves_room_for_others() -> None:
    places = Places(running=2, waiting=2, tenant_share=0.75)
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(places.hold("acme"))
        with pytest.raises(OverloadedError, match="of this tenant"), places.hold("acme"):
            pytest.fail("a fourth place was given")
        held.enter_context(places.hold("beta"))
        with pytest.raises(OverloadedError), places.hold("beta"):
            pytest.fail("a fifth place was given")
    with places.hold("acme"):
        pass
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(places.hold())
