"""The LMDB store in one process: what it does with damaged files, how it opens and closes."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import pytest
from platformdirs import user_cache_path

from alora_serve.errors import StoreError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.lmdb import LmdbStore, default_location, files, writer
from lmdb_blocks import BLOCK_BYTES, BUDGET_BYTES, block, held, put
from store_peer import PATIENCE_SECONDS, key_of, pattern, read


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[LmdbStore]:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES, recency_seconds=3600)
    yield store
    store.close()


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


def of_another_lmdb_version(data: Path) -> None:
    content = bytearray(data.read_bytes())
    for page in range(2):
        version = 4096 * page + 20
        assert content[version] == 1
        content[version] = 2
    data.write_bytes(content)


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
    of_another_lmdb_version,
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


def test_only_the_environment_that_was_damaged_is_set_aside(store: LmdbStore, root: Path) -> None:
    """Another thread or process may have replaced it before we come to it."""
    put(store, block("old"))
    deadline = time.monotonic() + PATIENCE_SECONDS
    with store._slot.lease(deadline) as damaged:
        (root / "v1").rename(root / "elsewhere")
        put(store, block("new"))
        with pytest.raises(StoreError, match="set aside"), store._slot.translating(damaged, deadline):
            raise lmdb.CorruptedError("as a late reader would find")
        assert held(store, "new", "old") == [True, False]
    assert not (root / "v1.aside").exists()


def test_a_thread_that_waits_for_the_old_files_to_close_takes_the_new_ones(store: LmdbStore, root: Path) -> None:
    put(store, block("a"))
    deadline = time.monotonic() + PATIENCE_SECONDS
    with store._slot.lease(deadline) as old:
        with store._slot._changed:
            store._slot._retire(old)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(held, store, "a", "b")
            while not store._slot._changed._waiters:  # type: ignore[attr-defined]
                time.sleep(0.001)
            (root / "v1").rename(root / "elsewhere")
            put(store, block("b"))
            with store._slot._changed:
                store._slot._changed.notify_all()
            assert waiting.result() == [False, True]
    assert held(store, "b") == [True]
    assert not (root / "v1.aside").exists()


def test_a_second_store_on_the_same_files_in_one_process_is_refused_and_harms_nothing(
    store: LmdbStore, root: Path
) -> None:
    put(store, block("a"))
    second = LmdbStore(root, budget_bytes=BUDGET_BYTES)
    with pytest.raises(StoreUnavailableError, match="already open"):
        held(second, "a")
    assert held(store, "a") == [True]


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


def test_what_is_committed_is_stored_though_its_file_is_set_aside_meanwhile(
    store: LmdbStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer.extend_to_last_page

    def after_another_process_was_there(*args: Any) -> None:
        (root / "v1").rename(root / "elsewhere")
        real(*args)

    monkeypatch.setattr(writer, "extend_to_last_page", after_another_process_was_there)
    put(store, block("a"))
    monkeypatch.undo()
    assert held(store, "a") == [False], "a miss, and no error"
    put(store, block("a"))
    assert held(store, "a") == [True]


def test_a_full_file_system_behind_a_commit_is_no_error(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "extend_to_last_page", full)
    put(store, block("a"))
    assert held(store, "a") == [True]


def test_damage_that_cannot_be_set_aside_is_a_store_error_until_it_can(store: LmdbStore, root: Path) -> None:
    put(store, *(block(number) for number in range(4)))
    garbage_after_the_header(root / "v1" / "data.mdb")
    (root / "open.lock").unlink()
    (root / "open.lock").mkdir()
    with pytest.raises(StoreError, match="cannot be set aside"):
        put(store, block("after"))
    (root / "open.lock").rmdir()
    assert use_until_it_works(store) <= 1


def test_what_the_system_refuses_is_a_store_error(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    put(store, block("a"))
    monkeypatch.setattr(writer.WriteIndex, "save", refuse)
    with pytest.raises(StoreError, match="not permitted"):
        put(store, block("b"))
    monkeypatch.undo()
    assert held(store, "a", "b") == [True, False]


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


def test_without_shared_memory_the_default_location_is_in_the_cache_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    monkeypatch.setenv("ALORA_CACHE_DIR", str(tmp_path))
    assert default_location() == tmp_path / "store"
    monkeypatch.delenv("ALORA_CACHE_DIR")
    assert default_location() == user_cache_path("alora-serve") / "store"


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


def test_a_thread_that_cannot_be_started_costs_that_job_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a container's limit of threads."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store, never_started = (LmdbStore(path, budget_bytes=BUDGET_BYTES) for path in (root, root / "other"))
    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        for each in (store, never_started):
            with pytest.raises(StoreUnavailableError, match="can't start new thread"):
                put(each, block("a"))
            each._writer.touch([key_of("a")])
    never_started.close()
    put(store, block("a"))
    assert held(store, "a") == [True]
    store.close()


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
