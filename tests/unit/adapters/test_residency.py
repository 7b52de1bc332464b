"""Leases, the byte budget and eviction order, without files."""

from __future__ import annotations

import threading

import pytest

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.adapters.residency import AdapterEvent, Lease, Residency
from alora_serve.types import AdapterDigest, AdapterInfo

SIZE_BYTES = 10


def adapter(name: str, digest: str = "v1", size_bytes: int = SIZE_BYTES) -> LoadedAdapter:
    info = AdapterInfo(name, AdapterDigest(digest), "lora", 4, ("q_proj",), (), "", size_bytes, resident=False)
    return LoadedAdapter(info, pairs={})


class Held:
    """A residency of three adapters' room, with its events."""

    def __init__(self) -> None:
        self.events: list[AdapterEvent] = []
        self.residency = Residency(max_bytes=3 * SIZE_BYTES, on_event=self.events.append)

    def names(self) -> set[str]:
        return {name for name in "abcdef" if (name, AdapterDigest("v1")) in self.residency.held()}

    def insert(self, *names: str) -> None:
        for name in names:
            self.residency.insert(adapter(name)).release()

    def lease(self, name: str, digest: str = "v1") -> Lease:
        lease = self.residency.lease(name, AdapterDigest(digest))
        assert lease is not None
        return lease

    def dropped(self) -> list[str]:
        return [event.name for event in self.events if event.kind in {"evict", "drop"}]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture
def held() -> Held:
    return Held()


def test_over_budget_the_least_recently_used_goes(held: Held) -> None:
    held.insert("a", "b", "c")
    held.lease("a").release()
    held.insert("d")
    assert held.names() == {"a", "c", "d"}, "by age alone, a would be gone"
    assert held.dropped() == ["b"]
    assert held.kinds() == ["hit", "evict"]
    assert held.residency.bytes_held() == 3 * SIZE_BYTES


def test_use_counts_until_the_release(held: Held) -> None:
    held.insert("a")
    lease = held.lease("a")
    held.insert("b", "c")
    lease.release()
    held.insert("d")
    assert held.names() == {"a", "c", "d"}


def test_leased_adapters_are_never_dropped_and_the_overrun_ends_with_the_lease(held: Held) -> None:
    leases = [held.residency.insert(adapter(name)) for name in "abcd"]
    assert held.names() == {"a", "b", "c", "d"}
    assert held.residency.bytes_held() == 4 * SIZE_BYTES
    leases[1].release()
    assert held.names() == {"a", "c", "d"}


def test_room_is_made_before_reading(held: Held) -> None:
    held.insert("a", "b", "c")
    held.residency.make_room(2 * SIZE_BYTES)
    assert held.names() == {"c"}
    held.residency.make_room(2 * SIZE_BYTES)
    assert held.names() == {"c"}


def test_an_adapter_larger_than_the_budget_stays_for_its_leases_alone(held: Held) -> None:
    lease = held.residency.insert(adapter("a", size_bytes=100))
    assert held.names() == {"a"}
    lease.release()
    assert held.names() == set()


def test_a_retired_adapter_leaves_with_its_last_lease(held: Held) -> None:
    first, second = held.residency.insert(adapter("a")), held.lease("a")
    held.insert("b")
    held.residency.retire(lambda name: name == "a")
    first.release()
    assert held.names() == {"a", "b"}
    second.release()
    assert held.names() == {"b"}
    assert held.dropped() == ["a"]


def test_releasing_twice_releases_once(held: Held) -> None:
    first, second = held.residency.insert(adapter("a")), held.lease("a")
    held.residency.retire(lambda name: True)
    first.release()
    first.release()
    assert held.names() == {"a"}, "a second decrement would drop an adapter that still runs"
    second.release()
    assert held.names() == set()


def test_a_lease_is_a_context_manager_that_releases_on_errors(held: Held) -> None:
    def run_into_an_error() -> None:
        with held.residency.insert(adapter("a")):
            held.residency.retire(lambda name: True)
            raise ValueError("while running")

    with pytest.raises(ValueError, match="while running"):
        run_into_an_error()
    assert held.names() == set()


def test_a_new_version_retires_the_old_and_running_sequences_keep_theirs(held: Held) -> None:
    old = held.residency.insert(adapter("a", "v1"))
    new = held.residency.insert(adapter("a", "v2"))
    assert (old.adapter.digest, new.adapter.digest) == ("v1", "v2")
    resumed = held.lease("a", "v1")
    assert resumed.adapter is old.adapter
    old.release()
    resumed.release()
    assert held.residency.lease("a", AdapterDigest("v1")) is None
    new.release()
    assert ("a", AdapterDigest("v2")) in held.residency.held()


def test_a_retired_version_makes_room_before_anything_current_does(held: Held) -> None:
    held.insert("a", "b", "c")
    held.residency.insert(adapter("c", "v2")).release()
    assert held.names() == {"a", "b"}
    assert ("c", AdapterDigest("v2")) in held.residency.held()


def test_a_version_that_is_still_held_is_not_held_twice(held: Held) -> None:
    lease = held.residency.insert(adapter("a"))
    held.residency.retire(lambda name: name == "a")
    again = held.residency.insert(adapter("a"))
    assert again.adapter is lease.adapter
    assert held.residency.bytes_held() == SIZE_BYTES
    lease.release()
    again.release()
    assert held.names() == {"a"}, "inserting it again takes the retirement back"


def test_hits_and_drops_are_reported_outside_the_lock() -> None:
    seen: list[tuple[str, str, int]] = []
    residency: Residency

    def on_event(event: AdapterEvent) -> None:
        seen.append((event.kind, event.name, residency.bytes_held()))  # deadlocks if the lock is held

    residency = Residency(max_bytes=0, on_event=on_event)
    lease = residency.insert(adapter("a"))
    hit = residency.lease("a", AdapterDigest("v1"))
    assert hit is not None
    hit.release()
    lease.release()
    assert seen == [("hit", "a", SIZE_BYTES), ("evict", "a", 0)]


def test_many_threads_leave_no_lease_behind(held: Held) -> None:
    held.insert("a", "b", "c")
    start = threading.Barrier(8)

    def use(names: str) -> None:
        start.wait()
        for name in names * 50:
            with held.residency.insert(adapter(name)):
                pass

    threads = [threading.Thread(target=use, args=(names,)) for names in ["abcd", "dcba", "badc", "cdab"] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held.residency.bytes_held() == 3 * SIZE_BYTES
    held.residency.retire(lambda name: True)
    assert held.residency.bytes_held() == 0
