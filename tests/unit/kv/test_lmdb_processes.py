"""The LMDB store among processes that are stopped and killed at the worst moments."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.store import Put
from store_peer import PATIENCE_SECONDS, Peer, key_of, pattern, read

BUDGET_BYTES = 8 << 20
BLOCK_BYTES = 500_000
BLOCK_COST_BYTES = 123 * 4096


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[LmdbStore]:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    yield store
    store.close()


@pytest.fixture
def peer(root: Path) -> Iterator[Peer]:
    with Peer(f"lmdb://{root}", BUDGET_BYTES) as peer:
        yield peer


def put(store: LmdbStore, name: str, timeout_seconds: float = PATIENCE_SECONDS) -> None:
    store.put_many([Put(key_of(name), pattern(key_of(name), BLOCK_BYTES))], timeout_seconds=timeout_seconds)


def held(store: LmdbStore, *names: str) -> list[bool]:
    return store.contains_many([key_of(name) for name in names], timeout_seconds=PATIENCE_SECONDS)


@pytest.mark.parametrize("end", [Peer.resume, Peer.kill])
def test_a_writer_stopped_in_its_transaction_delays_puts_but_no_reads(
    store: LmdbStore, root: Path, peer: Peer, end: Callable[[Peer], None]
) -> None:
    put(store, "a")
    peer.tell("stop_while_writing")
    peer.wait_until_stopped()
    threads = threading.active_count()
    for number in range(5):
        with pytest.raises(StoreTimeoutError):
            put(store, f"late-{number}", timeout_seconds=0.05)
    with pytest.raises(StoreTimeoutError):
        store.delete_many([key_of("a")], timeout_seconds=0.05)
    assert threading.active_count() == threads
    assert len(store._writer._queue) == 0
    assert read(store, [key_of("a")]) == {0: pattern(key_of("a"), BLOCK_BYTES)}
    with Peer(f"lmdb://{root}", BUDGET_BYTES) as newcomer:  # opening must not need the writer's lock either
        assert newcomer.ask("get", names=["a"]) == [hashlib.sha256(pattern(key_of("a"), BLOCK_BYTES)).hexdigest()]
    end(peer)
    put(store, "b")
    assert held(store, "a", "b") == [True, True]
    assert not any(held(store, *(f"late-{number}" for number in range(5)))), "a put that timed out came back"


def test_closing_does_not_wait_for_a_stopped_writer(store: LmdbStore, peer: Peer) -> None:
    put(store, "a")
    peer.tell("stop_while_writing")
    peer.wait_until_stopped()
    outcome: list[BaseException] = []

    def late_put() -> None:
        try:
            put(store, "late")
        except StoreError as error:
            outcome.append(error)

    with pytest.raises(StoreTimeoutError):
        put(store, "stuck", timeout_seconds=0.05)
    waiting = threading.Thread(target=late_put)
    waiting.start()
    while not store._writer._queue:
        waiting.join(0.01)
    store.close()
    waiting.join()
    assert isinstance(outcome[0], StoreUnavailableError)
    writer = store._writer._thread
    assert writer is not None
    assert writer.is_alive()
    peer.kill()
    writer.join(PATIENCE_SECONDS)
    assert not writer.is_alive()


def test_a_reader_stopped_in_its_transaction_costs_puts_but_never_the_budget(
    store: LmdbStore, root: Path, peer: Peer
) -> None:
    put(store, "pinned")
    peer.tell("stop_while_reading", name="pinned")
    peer.wait_until_stopped()
    names = [f"block-{number}" for number in range(150)]  # nine budgets, twice the map
    full = 0
    for name in names:
        try:
            put(store, name)
        except StoreFullError:
            full += 1
    assert full > 0
    assert BUDGET_BYTES // 3 < sum(held(store, *names)) * BLOCK_COST_BYTES <= BUDGET_BYTES
    assert (root / "v1" / "data.mdb").stat().st_size <= 4 * BUDGET_BYTES
    peer.kill()
    put(store, "after")
    assert read(store, [key_of("after")]) == {0: pattern(key_of("after"), BLOCK_BYTES)}


def test_killed_readers_do_not_make_the_file_grow(store: LmdbStore, root: Path) -> None:
    for round_number in range(3):
        put(store, "pinned")
        with Peer(f"lmdb://{root}", BUDGET_BYTES) as peer:
            peer.tell("stop_while_reading", name="pinned")
            peer.wait_until_stopped()
        for number in range(50):  # three budgets
            put(store, f"block-{round_number}-{number}")
    assert (root / "v1" / "data.mdb").stat().st_size < 2 * BUDGET_BYTES


def test_the_map_does_not_grow_with_the_file(store: LmdbStore, root: Path, peer: Peer) -> None:
    put(store, "pinned")
    peer.tell("stop_while_reading", name="pinned")
    peer.wait_until_stopped()
    for _ in range(2):
        for number in range(100):
            with suppress(StoreFullError):
                put(store, f"block-{number}")
        store.close()
        store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    assert (root / "v1" / "data.mdb").stat().st_size <= 4 * BUDGET_BYTES
    store.close()


def test_a_reader_that_goes_on_after_a_stop_sees_its_old_value(store: LmdbStore, peer: Peer) -> None:
    put(store, "a")
    peer.tell("stop_while_reading", name="a")
    peer.wait_until_stopped()
    for number in range(40):
        put(store, f"other-{number}")
    peer.resume()
    assert peer.reply() == "resumed"
    assert peer.ask("get", names=["a"]) == [None]


def test_killed_readers_and_writers_leave_whole_values_and_a_working_store(store: LmdbStore, root: Path) -> None:
    names = [f"churn-{number}" for number in range(6)]
    keys = [key_of(name) for name in names]
    for _ in range(4):
        with ExitStack() as peers:
            churning = [peers.enter_context(Peer(f"lmdb://{root}", BUDGET_BYTES)) for _ in range(2)]
            for peer in churning:
                peer.tell("churn", names=names, size=BLOCK_BYTES // 32 * 32)
            for peer in churning:
                assert peer.reply() == "churning"
        for value in read(store, keys).values():
            assert value == value[:32] * (BLOCK_BYTES // 32)
        put(store, "after")
        assert held(store, "after", *names) == [True] * 7


@pytest.mark.parametrize("running", [True, False])
def test_processes_that_find_damage_at_once_end_up_in_one_new_store(
    store: LmdbStore, root: Path, running: bool
) -> None:
    put(store, "before")
    if not running:
        store.close()
    data = root / "v1" / "data.mdb"
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(f"lmdb://{root}", BUDGET_BYTES)) for _ in range(3)]
        if running:
            for peer in peers:
                peer.ask("get", names=["before"])
        with data.open("r+b") as file:
            file.seek(2 * 4096 if running else 0)
            file.write(os.urandom(data.stat().st_size - file.tell()))
        for peer in peers:
            peer.tell("get", names=["before"])
        for peer in peers:
            assert peer.reply() in ([None], {"error": "StoreError"})
        for number, peer in enumerate(peers):
            peer.ask("put", names=[f"new-{number}"], size=1000)
        for peer in peers:
            assert None not in peer.ask("get", names=["new-0", "new-1", "new-2"])


def test_a_process_with_a_larger_budget_may_outgrow_our_map(root: Path) -> None:
    store = LmdbStore(root, budget_bytes=1 << 20)
    put(store, "ours")
    with Peer(f"lmdb://{root}", 64 << 20) as peer:
        names = [f"theirs-{number}" for number in range(40)]
        peer.ask("put", names=names, size=BLOCK_BYTES)
        with pytest.raises(StoreError, match="outgrew"):
            held(store, "ours")
        assert held(store, "ours", *names) == [True] * 41
    store.close()
