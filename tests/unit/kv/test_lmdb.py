"""The LMDB store in one process: what it evicts, what it does with damaged files, how it opens and closes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.lmdb import LmdbStore, default_location, files
from alora_serve.kv.store import Put
from store_peer import PATIENCE_SECONDS, key_of, pattern, read

BUDGET_BYTES = 8 << 20
BLOCK_BYTES = 1_000_000
BLOCKS = 8  # of 245 pages each: what fits into the budget


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[LmdbStore]:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES, recency_seconds=3600)
    yield store
    store.close()


def block(name: str | int, *, evict_first: bool = False) -> Put:
    return Put(key_of(name), pattern(key_of(name), BLOCK_BYTES), evict_first=evict_first)


def put(store: LmdbStore, *puts: Put) -> None:
    store.put_many(puts, timeout_seconds=PATIENCE_SECONDS)


def held(store: LmdbStore, *names: str | int) -> list[bool]:
    return store.contains_many([key_of(name) for name in names], timeout_seconds=PATIENCE_SECONDS)


# --- eviction ---------------------------------------------------------------------------------------------------------


def test_the_oldest_go_first_and_the_budget_holds(store: LmdbStore, root: Path) -> None:
    for number in range(40):
        put(store, block(number))
        assert sum(held(store, *range(40))) == min(number + 1, BLOCKS)
    assert held(store, *range(40)) == [False] * (40 - BLOCKS) + [True] * BLOCKS
    assert (root / "v1" / "data.mdb").stat().st_size < 2 * BUDGET_BYTES


def test_reading_makes_recent(store: LmdbStore) -> None:
    put(store, *(block(number) for number in range(BLOCKS)))
    read(store, [key_of(BLOCKS - 1), key_of("absent")])
    put(store, block("new"))
    assert held(store, BLOCKS - 1, "new") == [True, True]
    assert sum(held(store, *range(BLOCKS - 1))) == BLOCKS - 2


def test_partial_tails_go_before_full_blocks_however_recent(store: LmdbStore) -> None:
    put(store, block("old"))
    put(store, block("tail", evict_first=True))
    put(store, *(block(number) for number in range(BLOCKS - 2)))
    read(store, [key_of("tail")])
    put(store, block("new"))
    assert held(store, "tail", "old", "new") == [False, True, True]


def test_of_one_request_the_end_of_the_chain_goes_first(store: LmdbStore) -> None:
    put(store, *(block(number) for number in range(BLOCKS)))
    put(store, block("x"), block("y"), block("z"))
    assert held(store, *range(BLOCKS)) == [True] * (BLOCKS - 3) + [False] * 3
    read(store, [key_of(name) for name in (*range(BLOCKS - 3), "x", "y", "z")])
    put(store, block("new"))
    assert held(store, *range(BLOCKS - 3), "x", "y", "z") == [True] * (BLOCKS - 1) + [False]


def test_nothing_of_the_same_request_is_evicted_not_even_its_tail(store: LmdbStore) -> None:
    put(store, *(block(number) for number in range(BLOCKS)))
    put(store, block("tail", evict_first=True), *(block(f"new-{number}") for number in range(BLOCKS - 1)))
    assert held(store, "tail", *(f"new-{number}" for number in range(BLOCKS - 1))) == [True] * BLOCKS


def test_a_request_larger_than_the_budget_is_full_and_the_store_goes_on(store: LmdbStore) -> None:
    with pytest.raises(StoreFullError, match="budget"):
        put(store, *(block(number) for number in range(BLOCKS + 1)))
    put(store, block("next"))
    assert held(store, "next") == [True]


def test_a_value_larger_than_the_budget_evicts_nothing(store: LmdbStore) -> None:
    put(store, *(block(number) for number in range(BLOCKS)))
    with pytest.raises(StoreFullError):
        put(store, Put(key_of("huge"), bytes(BUDGET_BYTES + 1)))
    assert held(store, *range(BLOCKS), "huge") == [True] * BLOCKS + [False]


def test_a_replacement_that_does_not_fit_leaves_the_old_value(store: LmdbStore) -> None:
    put(store, block("a"))
    with pytest.raises(StoreFullError):
        put(store, Put(key_of("a"), bytes(BUDGET_BYTES + 1)))
    assert read(store, [key_of("a")]) == {0: pattern(key_of("a"), BLOCK_BYTES)}


def test_replacing_and_deleting_free_the_budget(store: LmdbStore) -> None:
    put(store, *(block(number) for number in range(BLOCKS)))
    for _ in range(3):
        put(store, *(block(number) for number in range(BLOCKS)))
        assert held(store, *range(BLOCKS)) == [True] * BLOCKS
    store.delete_many([key_of(0), key_of(1), key_of("absent")], timeout_seconds=PATIENCE_SECONDS)
    put(store, block("x"), block("y"))
    assert held(store, *range(2, BLOCKS), "x", "y") == [True] * BLOCKS


def test_recency_reaches_the_files_without_a_put(root: Path) -> None:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES, recency_seconds=0.01)
    put(store, *(block(number) for number in range(BLOCKS)))
    read(store, [key_of(BLOCKS - 1)])
    until = time.monotonic() + PATIENCE_SECONDS
    while store._writer._touched and time.monotonic() < until:
        time.sleep(0.01)
    store.close()
    again = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    put(again, block("new"))
    assert held(again, BLOCKS - 1, BLOCKS - 2) == [True, False]
    again.close()


# --- files ------------------------------------------------------------------------------------------------------------


def garbage(data: Path) -> None:
    data.write_bytes(os.urandom(data.stat().st_size))


def garbage_after_the_header(data: Path) -> None:
    with data.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(os.urandom(data.stat().st_size - 2 * 4096))


def truncated(data: Path) -> None:
    os.truncate(data, data.stat().st_size // 2)


def truncated_by_one_page(data: Path) -> None:
    os.truncate(data, data.stat().st_size - 4096)


def truncated_within_the_header(data: Path) -> None:
    os.truncate(data, 100)


def replaced_by_a_file(data: Path) -> None:
    data.unlink()
    (data.parent / "lock.mdb").unlink()
    data.parent.rmdir()
    data.parent.write_text("not a directory")


DAMAGE = [
    garbage,
    garbage_after_the_header,
    truncated,
    truncated_by_one_page,
    truncated_within_the_header,
    replaced_by_a_file,
]


def use_until_it_works(store: LmdbStore) -> int:
    """How many calls the damage cost before one put and one get went through."""
    errors = 0
    while True:
        try:
            read(store, [key_of(number) for number in range(4)])
            put(store, block("after"))
            assert read(store, [key_of("after")]) == {0: pattern(key_of("after"), BLOCK_BYTES)}
        except StoreError:
            errors += 1
            assert errors < 3
        else:
            return errors


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_set_aside_and_the_store_starts_again(root: Path, damage: Callable[[Path], None]) -> None:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    put(store, *(block(number) for number in range(4)))
    store.close()
    damage(root / "v1" / "data.mdb")
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    assert use_until_it_works(store) <= 1
    assert (root / "v1.aside").exists()
    assert not any(held(store, *range(4)))
    store.close()


def test_damage_under_a_running_store_costs_one_call(store: LmdbStore, root: Path) -> None:
    for _ in range(2):  # the second time there is an environment aside already
        put(store, *(block(number) for number in range(4)))
        garbage_after_the_header(root / "v1" / "data.mdb")
        assert use_until_it_works(store) == 1
    assert (root / "v1.aside" / "data.mdb").exists()


def test_damage_found_by_many_threads_at_once_is_set_aside_once(store: LmdbStore, root: Path) -> None:
    put(store, *(block(number) for number in range(4)))
    garbage_after_the_header(root / "v1" / "data.mdb")
    ready = threading.Barrier(4)

    def use() -> int:
        ready.wait()
        return use_until_it_works(store)

    with ThreadPoolExecutor(4) as threads:
        errors = [future.result() for future in [threads.submit(use) for _ in range(4)]]
    assert 1 <= max(errors) <= 2
    assert held(store, "after") == [True]


def test_damage_in_our_own_bookkeeping_is_damage_too(store: LmdbStore, root: Path) -> None:
    put(store, block("a"))
    with store._slot.lease(time.monotonic() + 1) as opened, opened.env.begin(write=True) as txn:
        txn.put(b"m" + key_of("a"), b"not ours")
    with pytest.raises(StoreError, match="set aside"):
        put(store, block("a"))
    assert use_until_it_works(store) == 0


def test_a_store_whose_files_were_deleted_starts_again_by_itself(store: LmdbStore, root: Path) -> None:
    put(store, block("a"))
    for file in (root / "v1").iterdir():
        file.unlink()
    (root / "v1").rmdir()
    assert held(store, "a") == [False]
    put(store, block("b"))
    assert held(store, "b") == [True]


def test_a_whole_file_is_extended_to_the_end_that_lmdb_did_not_write(store: LmdbStore, root: Path) -> None:
    put(store, block("a"))
    data = root / "v1" / "data.mdb"
    with store._slot.lease(time.monotonic() + 1) as opened:
        size = data.stat().st_size
        os.truncate(data, size - 4096)
        files.extend_to_last_page(opened.env, data, opened.page_bytes)
        assert data.stat().st_size == size
        files.refuse_truncated(opened.env, data, opened.page_bytes)


def test_the_budget_is_clamped_to_the_file_system_and_old_damage_makes_room(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = root / "v1.aside"
    aside.mkdir(parents=True)
    real = os.statvfs(root)

    class SmallFilesystem:
        f_frsize = 4096
        f_bavail = (4 << 20) // 4096

    monkeypatch.setattr(os, "statvfs", lambda path: SmallFilesystem if aside.parent == Path(path) else real)
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    put(store, block(1), block(2), block(3))
    put(store, block(4))
    assert sum(held(store, 1, 2, 3, 4)) == 3
    assert not aside.exists()
    store.close()


def test_the_map_being_full_is_a_full_store_and_the_next_put_fits(root: Path) -> None:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    put(store, *(block(number) for number in range(BLOCKS)))
    with store._slot.lease(time.monotonic() + 1) as opened:
        opened.env.set_mapsize(BUDGET_BYTES)
        with opened.env.begin():  # pins every page
            with pytest.raises(StoreFullError, match="full"):
                put(store, *(block(f"new-{number}") for number in range(4)))
            for number in range(20):
                with pytest.raises(StoreFullError):
                    put(store, block(f"again-{number}"))
            assert sum(held(store, *range(BLOCKS))) >= BLOCKS // 2 - 1, "put after put must not empty the store"
    put(store, block("fits"))
    assert held(store, "fits") == [True]
    store.close()


def test_running_out_of_reader_slots_is_an_error_that_passes(store: LmdbStore) -> None:
    put(store, block("a"))
    with store._slot.lease(time.monotonic() + 1) as opened:
        readers = [opened.env.begin() for _ in range(opened.env.max_readers())]
        with pytest.raises(StoreError, match="reader slots"):
            held(store, "a")
        del readers
    assert held(store, "a") == [True]


# --- opening and closing ----------------------------------------------------------------------------------------------


def test_the_default_location_is_per_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    assert default_location() == Path(f"/dev/shm/alora-serve-{os.getuid()}")
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    assert "alora-serve" in default_location().parts
    assert default_location().name == "store"


def test_another_users_directory_in_a_shared_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(os, "getuid", lambda: 123_456)
    store = LmdbStore(shared / "alora", budget_bytes=BUDGET_BYTES)
    with pytest.raises(StoreUnavailableError, match="another user"):
        held(store, "a")


def test_a_place_that_cannot_be_written_is_unavailable_not_a_crash() -> None:
    store = LmdbStore(Path("/proc/none/store"), budget_bytes=BUDGET_BYTES)
    with pytest.raises(StoreUnavailableError, match="/proc/none/store"):
        held(store, "a")


def test_files_are_for_their_user_only(store: LmdbStore, root: Path) -> None:
    put(store, block("a"))
    for path in (root, root / "v1", root / "v1" / "data.mdb"):
        assert path.stat().st_mode & 0o077 == 0


def test_opening_waits_for_the_lock_no_longer_than_it_may(root: Path) -> None:
    root.mkdir()
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    with files.file_lock(root / "open.lock", time.monotonic() + 1), pytest.raises(StoreTimeoutError):
        store.contains_many([key_of("a")], timeout_seconds=0.05)
    assert held(store, "a") == [False]
    store.close()


def test_a_store_used_before_a_fork_says_so(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, block("a"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(StoreUnavailableError, match="fork"):
        held(store, "a")
    monkeypatch.undo()


def test_close_ends_the_thread_and_lets_the_files_be_opened_again(root: Path) -> None:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    put(store, block("a"))
    read(store, [key_of("a")])
    thread = store._writer._thread
    store.close()
    assert thread is not None
    assert not thread.is_alive()
    with lmdb.open(str(root / "v1")) as env:
        assert env.stat()["entries"] == 4
