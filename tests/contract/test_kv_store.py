"""What every ``KVStore`` promises, held against every backend, bare and wrapped."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from alora_serve.errors import StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.store import KVStore, Put, StoreKey
from redis_servers import Place
from store_peer import PATIENCE_SECONDS, Peer, key_of, pattern, read


def put(store: KVStore, *puts: Put) -> None:
    store.put_many(puts, timeout_seconds=PATIENCE_SECONDS)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 1 << 20, 3 << 20])
def test_a_value_comes_back_as_it_was_put(store: KVStore, size: int) -> None:
    key = key_of("value")
    put(store, Put(key, pattern(key, size)))
    assert read(store, [key]) == {0: pattern(key, size)}


def test_any_contiguous_buffer_can_be_put(store: KVStore) -> None:
    floats = memoryview(bytearray(pattern(key_of("floats"), 64))).cast("f", [4, 4])
    put(store, Put(key_of("floats"), floats), Put(key_of("array"), bytearray(b"array")), Put(key_of("none"), b""))
    values = read(store, [key_of("floats"), key_of("array"), key_of("none")])
    assert values == {0: floats.tobytes(), 1: b"array", 2: b""}


def test_missing_keys_are_skipped_and_indices_stay_those_of_the_request(store: KVStore) -> None:
    put(store, Put(key_of("b"), b"B"), Put(key_of("d"), b"D"))
    keys = [key_of(name) for name in "abcd"]
    assert read(store, keys) == {1: b"B", 3: b"D"}
    assert store.contains_many(keys, timeout_seconds=PATIENCE_SECONDS) == [False, True, False, True]


def test_empty_requests_do_nothing(store: KVStore) -> None:
    put(store)
    store.delete_many([], timeout_seconds=PATIENCE_SECONDS)
    assert read(store, []) == {}
    assert store.contains_many([], timeout_seconds=PATIENCE_SECONDS) == []


def test_a_key_asked_for_twice_is_handed_out_for_each_index(store: KVStore) -> None:
    put(store, Put(key_of("a"), b"A"))
    assert read(store, [key_of("a"), key_of("none"), key_of("a")]) == {0: b"A", 2: b"A"}


def test_a_second_put_replaces_the_value_and_of_duplicates_the_last_counts(store: KVStore) -> None:
    put(store, Put(key_of("a"), b"first" * 10_000))
    put(store, Put(key_of("a"), b"second"), Put(key_of("a"), b"third" * 1000, evict_first=True))
    assert read(store, [key_of("a")]) == {0: b"third" * 1000}
    put(store, Put(key_of("a"), b""))
    assert read(store, [key_of("a")]) == {0: b""}


def test_many_keys_in_one_request(store: KVStore) -> None:
    keys = [key_of(number) for number in range(1500)]
    put(store, *(Put(key, pattern(key, 100)) for key in keys))
    assert read(store, keys) == {index: pattern(key, 100) for index, key in enumerate(keys)}
    assert store.contains_many([*keys, key_of("none")], timeout_seconds=PATIENCE_SECONDS) == [True] * 1500 + [False]
    store.delete_many(keys, timeout_seconds=PATIENCE_SECONDS)
    assert not any(store.contains_many(keys, timeout_seconds=PATIENCE_SECONDS))


def test_deleted_keys_are_gone_and_absent_ones_ignored(store: KVStore) -> None:
    put(store, Put(key_of("a"), b"A"), Put(key_of("b"), b"B"))
    store.delete_many([key_of("a"), key_of("none")], timeout_seconds=PATIENCE_SECONDS)
    assert read(store, [key_of("a"), key_of("b")]) == {1: b"B"}


def test_a_view_kept_beyond_the_call_cannot_be_read(store: KVStore) -> None:
    put(store, Put(key_of("a"), b"A"))
    kept: list[memoryview] = []
    store.get_many([key_of("a")], lambda _, value: kept.append(value), timeout_seconds=PATIENCE_SECONDS)
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0])


def test_the_view_is_read_only(store: KVStore) -> None:
    put(store, Put(key_of("a"), b"A"))
    read_only: list[bool] = []
    store.get_many([key_of("a")], lambda _, value: read_only.append(value.readonly), timeout_seconds=PATIENCE_SECONDS)
    assert read_only == [True]


def test_the_store_keeps_no_reference_to_a_value(store: KVStore) -> None:
    class Value(bytearray):
        """A buffer that can be watched."""

    value = Value(b"before")
    put(store, Put(key_of("a"), value))
    value[:] = b"after!"
    assert read(store, [key_of("a")]) == {0: b"before"}
    watched = weakref.ref(value)
    del value
    assert watched() is None


class SinkError(Exception):
    """What the tests' sinks raise."""


@pytest.mark.parametrize("error", [SinkError("no"), StoreUnavailableError("of another store"), KeyboardInterrupt()])
def test_a_sinks_error_reaches_the_caller_and_the_store_stays_usable(store: KVStore, error: BaseException) -> None:
    keys = [key_of(number) for number in range(40)]
    put(store, *(Put(key, pattern(key, 5000)) for key in keys))

    def sink(index: int, value: memoryview) -> None:
        if index == 3:
            raise error

    for _ in range(6):  # more often than the breaker would stand
        with pytest.raises(type(error)) as caught:
            store.get_many(keys, sink, timeout_seconds=PATIENCE_SECONDS)
        assert caught.value is error
    assert read(store, keys) == {index: pattern(key, 5000) for index, key in enumerate(keys)}


def test_no_sink_runs_after_the_call_has_ended(store: KVStore) -> None:
    keys = [key_of(number) for number in range(64)]
    put(store, *(Put(key, pattern(key, 50_000)) for key in keys))
    running = threading.Semaphore(0)
    ended = threading.Event()
    late: list[int] = []

    def sink(index: int, value: memoryview) -> None:
        if ended.is_set():
            late.append(index)
        if index == 9:
            raise SinkError
        running.release()

    with pytest.raises(SinkError):
        store.get_many(keys, sink, timeout_seconds=PATIENCE_SECONDS)
    ended.set()
    assert read(store, keys[:1]) == {0: pattern(keys[0], 50_000)}
    assert late == []


def test_values_are_visible_to_another_process_when_put_returns(store: KVStore, place: Place) -> None:
    with Peer(place.url, tls=place.tls) as peer:
        for version in range(5):
            put(store, Put(key_of("a"), pattern(key_of("a"), 100_000, version)))
            expected = hashlib.sha256(pattern(key_of("a"), 100_000, version)).hexdigest()
            assert peer.ask("get", names=["a", "none"]) == [expected, None]
        peer.ask("put", names=["b"], size=200_000)
        assert read(store, [key_of("b")]) == {0: pattern(key_of("b"), 200_000)}
        peer.ask("delete", names=["a", "b"])
        assert read(store, [key_of("a"), key_of("b")]) == {}


def test_values_outlive_the_process_that_put_them(store: KVStore, place: Place) -> None:
    with Peer(place.url, tls=place.tls) as peer:
        peer.ask("put", names=["a"], size=100_000)
    assert read(store, [key_of("a")]) == {0: pattern(key_of("a"), 100_000)}


def test_readers_see_whole_values_while_threads_and_another_process_write(store: KVStore, place: Place) -> None:
    names, size, versions = [f"shared-{number}" for number in range(4)], 60_000, 8
    keys = [key_of(name) for name in names]

    def write(offset: int) -> None:
        for version in range(versions):
            put(store, *(Put(key, pattern(key, size, offset + version)) for key in keys))

    def check() -> int:
        seen = 0
        for _ in range(20):
            for index, value in read(store, keys).items():
                assert value == value[:32] * (size // 32)
                seen += index >= 0
        return seen

    with Peer(place.url, tls=place.tls) as peer, ThreadPoolExecutor(4) as threads:
        put(store, *(Put(key, pattern(key, size)) for key in keys))
        peer.tell("churn", names=names, size=size)
        writers = [threads.submit(write, offset) for offset in (0, 100)]
        readers = [threads.submit(check) for _ in range(2)]
        for future in (*writers, *readers):
            future.result()
        assert [reader.result() for reader in readers] == [20 * len(keys)] * 2


CALLS: dict[str, Callable[[KVStore, float], object]] = {
    "get": lambda store, seconds: store.get_many([key_of("a")], lambda *_: None, timeout_seconds=seconds),
    "contains": lambda store, seconds: store.contains_many([key_of("a")], timeout_seconds=seconds),
    "put": lambda store, seconds: store.put_many([Put(key_of("a"), b"new")], timeout_seconds=seconds),
    "delete": lambda store, seconds: store.delete_many([key_of("a")], timeout_seconds=seconds),
}


@pytest.mark.parametrize("call", CALLS)
def test_without_time_left_every_call_times_out_and_changes_nothing(store: KVStore, call: str) -> None:
    put(store, Put(key_of("a"), b"old"))
    for seconds in (0.0, -1.0):
        with pytest.raises(StoreTimeoutError):
            CALLS[call](store, seconds)
    assert read(store, [key_of("a")]) == {0: b"old"}


@pytest.mark.parametrize("call", CALLS)
def test_after_close_every_call_says_unavailable(store: KVStore, call: str) -> None:
    put(store, Put(key_of("a"), b"A"))
    store.close()
    store.close()
    with pytest.raises(StoreUnavailableError):
        CALLS[call](store, PATIENCE_SECONDS)


@pytest.mark.parametrize("call", CALLS)
def test_a_store_closed_before_its_first_use_says_unavailable(store: KVStore, call: str) -> None:
    store.close()
    with pytest.raises(StoreUnavailableError):
        CALLS[call](store, PATIENCE_SECONDS)


def test_close_during_a_read_leaves_the_view_valid(store: KVStore) -> None:
    put(store, Put(key_of("a"), pattern(key_of("a"), 500_000)))
    copies: list[bytes] = []

    def sink(index: int, value: memoryview) -> None:
        store.close()
        copies.append(bytes(value))

    store.get_many([key_of("a")], sink, timeout_seconds=PATIENCE_SECONDS)
    assert copies == [pattern(key_of("a"), 500_000)]


class StoreAgainstDict(RuleBasedStateMachine):
    """Any sequence of calls leaves the store equal to a dictionary."""

    names = st.sampled_from([key_of(number) for number in range(6)])
    values = st.tuples(st.integers(0, 255), st.sampled_from([0, 1, 2000, 4080, 4081, 9000, 70_000])).map(
        lambda shape: bytes([shape[0]]) * shape[1]
    )

    def __init__(self, store: KVStore) -> None:
        super().__init__()
        self.store = store
        self.model: dict[StoreKey, bytes] = {}

    @initialize()
    def empty(self) -> None:
        self.store.delete_many([key_of(number) for number in range(6)], timeout_seconds=PATIENCE_SECONDS)

    @rule(puts=st.lists(st.builds(Put, names, values, st.booleans()), max_size=5))
    def put(self, puts: list[Put]) -> None:
        self.store.put_many(puts, timeout_seconds=PATIENCE_SECONDS)
        self.model |= {one.key: bytes(one.value) for one in puts}

    @rule(keys=st.lists(names, max_size=4))
    def delete(self, keys: list[StoreKey]) -> None:
        self.store.delete_many(keys, timeout_seconds=PATIENCE_SECONDS)
        for key in keys:
            self.model.pop(key, None)

    @rule(keys=st.lists(names, max_size=8))
    def get(self, keys: list[StoreKey]) -> None:
        expected = {index: self.model[key] for index, key in enumerate(keys) if key in self.model}
        assert read(self.store, keys) == expected

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        keys = [key_of(number) for number in range(6)]
        held = self.store.contains_many(keys, timeout_seconds=PATIENCE_SECONDS)
        assert held == [key in self.model for key in keys]


def test_any_sequence_of_calls_leaves_the_store_equal_to_a_dictionary(store: KVStore) -> None:
    run_state_machine_as_test(
        lambda: StoreAgainstDict(store),
        settings=settings(
            max_examples=12,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
