"""Blocks of a size that makes counting easy, for tests of the LMDB store."""

from __future__ import annotations

from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.store import Put
from store_peer import PATIENCE_SECONDS, key_of, pattern

BUDGET_BYTES = 8 << 20
BLOCK_BYTES = 1_000_000
BLOCKS = 8  # of 245 pages each: what fits into the budget


def block(name: str | int, *, evict_first: bool = False) -> Put:
    """A block that only its name determines."""
    return Put(key_of(name), pattern(key_of(name), BLOCK_BYTES), evict_first=evict_first)


def put(store: LmdbStore, *puts: Put) -> None:
    """Store them in one request."""
    store.put_many(puts, timeout_seconds=PATIENCE_SECONDS)


def held(store: LmdbStore, *names: str | int) -> list[bool]:
    """Which of them are there."""
    return store.contains_many([key_of(name) for name in names], timeout_seconds=PATIENCE_SECONDS)
