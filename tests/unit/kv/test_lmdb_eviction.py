"""What the LMDB store evicts, in which order, and how it keeps to its budget."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alora_serve.errors import StoreFullError
from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.store import Put
from lmdb_blocks import BLOCK_BYTES, BLOCKS, BUDGET_BYTES, block, held, put
from store_peer import PATIENCE_SECONDS, key_of, pattern, read


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[LmdbStore]:
    store = LmdbStore(root, budget_bytes=BUDGET_BYTES, recency_seconds=3600)
    yield store
    store.close()


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
