"""A Redis behind a bad network, a promoted replica and a lost node: calls end in time, and go on once they can."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.guarded import GuardedStore
from alora_serve.kv.redis import RedisStore
from alora_serve.kv.store import KVStore, Put
from faulty_network import CALM, FaultyNetwork, Weather
from redis_groups import cluster, watched
from redis_servers import Certificates, Place, RedisProcess, make_certificates, tls_server, until, valkey_server
from store_peer import PATIENCE_SECONDS, RecordingMetrics, key_of, pattern, read

KEYS = [key_of(number) for number in range(24)]
PUTS = [Put(key, pattern(key, 50_000)) for key in KEYS]
LARGE = Put(key_of("large"), bytes(16 << 20))


def is_usable(store: KVStore, timeout_seconds: float = 2.0) -> bool:
    """Everything can be written and read again."""
    try:
        store.put_many(PUTS, timeout_seconds=timeout_seconds)
        return read(store, KEYS, timeout_seconds) == {index: put.value for index, put in enumerate(PUTS)}
    except StoreError:
        return False


@dataclass(frozen=True, slots=True)
class Far:
    """A store of which every server is behind a network."""

    networks: list[FaultyNetwork]
    place: Place

    def become(self, weather: Weather) -> None:
        for network in self.networks:
            network.weather = weather


def networks_of(servers: Iterable[RedisProcess]) -> list[FaultyNetwork]:
    return [server.network for server in servers if server.network is not None]


@pytest.fixture(params=["plain", "mutual TLS", "cluster", "sentinels"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Far]:
    """The last two over mutual TLS."""
    if request.param == "plain":
        with valkey_server() as server, FaultyNetwork(server.host, server.port) as network:
            yield Far([network], Place(f"redis://{network.address}/0"))
        return
    files = make_certificates(tmp_path)
    if request.param == "mutual TLS":
        with tls_server(tmp_path, files, mutual=True) as server, FaultyNetwork("127.0.0.1", server.port) as network:
            yield Far([network], Place(f"rediss://{network.address}/0", files.mutual))
    elif request.param == "cluster":
        with cluster(tmp_path, certificates=files, far=True) as nodes:
            url = f"rediss+cluster://127.0.0.1:{nodes[0].public_port}"
            yield Far(networks_of(nodes), Place(url, files.mutual))
    else:
        with watched(tmp_path, files, far=True) as servers:
            yield Far(networks_of(servers.all), Place(servers.url, files.mutual))


@pytest.mark.parametrize(
    ("weather", "error"),
    [
        (Weather(latency_seconds=2.0), StoreTimeoutError),
        (Weather(bytes_per_second=100_000), StoreTimeoutError),
        (Weather(is_silent=True), StoreTimeoutError),
        (Weather(is_refusing=True), StoreUnavailableError),
    ],
)
@pytest.mark.timeout(120)
def test_a_call_ends_by_its_deadline_and_the_next_one_works_in_better_weather(
    far: Far, weather: Weather, error: type[StoreError]
) -> None:
    store = RedisStore(far.place.url, ttl_seconds=600, tls=far.place.tls)
    assert is_usable(store)
    far.become(weather)
    for call in (
        partial(store.get_many, KEYS, lambda *_: None),
        partial(store.put_many, [LARGE]),  # more than the buffers on the way take
    ):
        began = time.monotonic()
        with pytest.raises(error):
            call(timeout_seconds=0.3)
        assert time.monotonic() - began < 1.0
    far.become(CALM)
    until(lambda: is_usable(store), "a store that works again")
    store.close()


def test_a_server_that_takes_no_writes_is_there_and_no_breaker_opens() -> None:
    with valkey_server() as server, server.client() as client:
        redis = RedisStore(f"redis://{server.host}:{server.port}/0", ttl_seconds=600)
        store = GuardedStore(redis, failures_to_open=2, reset_seconds=60, metrics=RecordingMetrics())
        assert is_usable(store)
        client.execute_command("REPLICAOF", "127.0.0.1", 1)
        for _ in range(3):
            with pytest.raises(StoreError, match="read only"):
                store.put_many(PUTS, timeout_seconds=PATIENCE_SECONDS)
        assert len(read(store, KEYS)) == len(KEYS)
        client.execute_command("REPLICAOF", "NO", "ONE")
        assert is_usable(store)
        store.close()


@dataclass(frozen=True, slots=True)
class Group:
    """A store on several servers, over mutual TLS.

    Attributes:
        masters: those that take writes.
        serving: those that may have to, once others are lost.
        everyone: these, and who watches them.
    """

    place: Place
    files: Certificates
    masters: list[RedisProcess]
    serving: list[RedisProcess]
    everyone: list[RedisProcess]

    def tell(self, *command: object) -> None:
        for master in self.masters:
            with master.client() as client:
                client.execute_command(*command)


@pytest.fixture(params=["cluster", "sentinels"])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Group]:
    files = make_certificates(tmp_path)
    if request.param == "cluster":
        with cluster(tmp_path, certificates=files) as nodes:
            place = Place(f"rediss+cluster://127.0.0.1:{nodes[0].port}", files.mutual)
            yield Group(place, files, nodes, nodes, nodes)
        return
    with watched(tmp_path, files) as servers:
        either = [servers.master, servers.replica]
        yield Group(Place(servers.url, files.mutual), files, [servers.master], either, servers.all)


@pytest.mark.timeout(120)
def test_a_group_that_is_full_takes_no_writes_or_forgets_is_read_and_used_again(group: Group) -> None:
    redis = RedisStore(group.place.url, ttl_seconds=600, tls=group.place.tls)
    store = GuardedStore(redis, failures_to_open=1, reset_seconds=60, metrics=RecordingMetrics())
    assert is_usable(store)
    for setting, worst, error in (("maxmemory", 1, StoreFullError), ("min-replicas-to-write", 9, StoreError)):
        group.tell("CONFIG", "SET", setting, worst)
        with pytest.raises(error):
            store.put_many(PUTS, timeout_seconds=PATIENCE_SECONDS)
        assert len(read(store, KEYS)) == len(KEYS)
        group.tell("CONFIG", "SET", setting, 0)
        assert is_usable(store)
    group.tell("FLUSHALL")
    assert read(store, KEYS) == {}
    assert is_usable(store)
    store.close()


@pytest.mark.timeout(120)
def test_a_group_that_shows_an_expired_certificate_or_starts_empty_is_used_again(group: Group) -> None:
    store = RedisStore(group.place.url, ttl_seconds=600, tls=group.place.tls)
    assert is_usable(store)
    for server in group.serving:
        server.show(group.files.expired_file)
    with pytest.raises(StoreUnavailableError, match="certificate has expired"):
        read(store, KEYS)
    for server in group.serving:
        server.show(group.files.server_file)
    until(lambda: is_usable(store), "a store that shows its certificate again")
    for server in group.everyone:
        server.kill()
    with pytest.raises(StoreUnavailableError):
        read(store, KEYS)
    for server in group.everyone:
        server.start()
    until(lambda: is_usable(store), "a store that was started empty")
    store.close()


@pytest.mark.timeout(120)
def test_a_slot_that_moves_fails_one_write_and_is_found_at_the_next(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        redis = RedisStore(f"redis+cluster://127.0.0.1:{nodes[0].port}", ttl_seconds=600)
        store = GuardedStore(redis, failures_to_open=1, reset_seconds=60, metrics=RecordingMetrics())
        assert is_usable(store)
        slot = key_slot(b"alora:" + KEYS[0])
        store.delete_many([key for key in KEYS if key_slot(b"alora:" + key) == slot], timeout_seconds=2.0)
        owner = slot // (REDIS_CLUSTER_HASH_SLOTS // 3)
        with nodes[(owner + 1) % 3].client() as client:
            takes_over = client.execute_command("CLUSTER", "MYID")
        for node in nodes:
            with node.client() as client:
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", takes_over)
        with pytest.raises(StoreError, match=str(slot)):
            store.put_many(PUTS, timeout_seconds=PATIENCE_SECONDS)
        assert is_usable(store)
        store.close()


@pytest.mark.timeout(120)
def test_the_replica_that_sentinels_promote_is_found(tmp_path: Path) -> None:
    with watched(tmp_path) as servers:
        store = RedisStore(servers.url, ttl_seconds=600)
        assert is_usable(store)
        servers.master.kill()
        until(lambda: is_usable(store), "a store on the promoted replica")
        with servers.replica.client() as client:
            assert client.dbsize() == len(KEYS)
        store.close()


@pytest.mark.timeout(120)
def test_the_replica_that_a_cluster_promotes_is_found_and_other_nodes_go_on(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1) as nodes:
        store = RedisStore(f"redis+cluster://127.0.0.1:{nodes[1].port}", ttl_seconds=600)
        assert is_usable(store)
        with nodes[1].client() as client:
            held = {*client.keys()}
        there = [key for key in KEYS if b"alora:" + key in held]
        assert 0 < len(there) < len(KEYS)
        nodes[0].kill()
        assert len(read(store, there, PATIENCE_SECONDS)) == len(there)
        until(lambda: is_usable(store), "a store on the promoted replica")
        store.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["cluster", "sentinels"])
def test_the_replica_of_a_master_that_falls_silent_is_found(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if kind == "cluster":
            nodes = stack.enter_context(cluster(tmp_path, replicas=1))
            master, url = nodes[0], f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
        else:
            servers = stack.enter_context(watched(tmp_path))
            master, url = servers.master, servers.url
            # Who is asked first is on the machine that is lost.
            servers.sentinels[0].hang()
        store = RedisStore(url, ttl_seconds=600)
        assert is_usable(store)
        master.hang()
        until(lambda: is_usable(store, 0.5), "a store on the promoted replica")
        store.close()


@pytest.mark.parametrize("url", ["redis+cluster://{}", "redis+sentinel://{}/kv-master/0"], ids=["cluster", "sentinels"])
def test_a_call_waits_no_longer_than_it_may_for_another_that_asks_where_keys_are(url: str) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        hosts = ",".join(f"127.0.0.1:{server.getsockname()[1]}" for server in silent)
        store = RedisStore(url.format(hosts), ttl_seconds=600)
        others = stack.enter_context(ThreadPoolExecutor())
        asking = others.submit(store.put_many, PUTS, timeout_seconds=10.0)
        until(lambda: is_asked(silent[0]), "a call that asks")
        began = time.monotonic()
        with pytest.raises(StoreTimeoutError):
            store.contains_many(KEYS, timeout_seconds=0.2)
        assert time.monotonic() - began < 1.0
        with pytest.raises(StoreUnavailableError):
            asking.result()
        store.close()


def is_asked(server: socket.socket) -> bool:
    """Somebody has connected."""
    return bool(select.select([server], [], [], 0.0)[0])


def test_a_new_authority_takes_over_at_the_next_connection(tmp_path: Path) -> None:
    for name in ("used", "new"):
        (tmp_path / name).mkdir()
    used, new = make_certificates(tmp_path / "used"), make_certificates(tmp_path / "new")
    with tls_server(tmp_path, used, mutual=True) as server:
        store = RedisStore(f"rediss://127.0.0.1:{server.port}/0", ttl_seconds=600, tls=used.mutual)
        assert is_usable(store)
        server.kill()
        for file in ("ca_file", "server_file", "client_file"):
            getattr(new, file).replace(getattr(used, file))
        server.start()
        until(lambda: is_usable(store), "a store that goes by the files as they are now")
        store.close()
