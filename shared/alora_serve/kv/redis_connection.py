"""Connections to Redis whose every operation ends by one deadline, and that send values without copying them.

redis-py gives each single ``recv`` the whole time-out, so a server that trickles would be waited for without end. Here
the socket itself knows the deadline. redis-py with hiredis also packs commands in C, which copies each value once more;
the Python packer passes memoryviews through to ``sendall``. Both hang on hooks of redis-py that are not promised to
stay (``_connect``, ``command_packer``); tests hold them in force and the dependency is pinned to one minor version.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from redis.backoff import NoBackoff
from redis.connection import Connection, PythonRespSerializer, UnixDomainSocketConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse
from redis.retry import Retry
from typing_extensions import Buffer

from alora_serve.errors import StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.redis_url import Address, RedisUrl, TlsFiles

_READ_BYTES = 1 << 18  # a value of 1 MiB in 4 reads instead of 32
_COPY_BELOW_BYTES = 6000  # the packer joins smaller arguments into one buffer
_TLS_WRITE_BYTES = 1 << 18


class _Deadline:
    """Mixed into a socket: all its reads and writes end by ``deadline`` (``time.monotonic()``).

    Reads end after ``allowed_bytes``, too: whoever can write to the server decides how long a reply says it is.
    """

    deadline = float("inf")
    allowed_bytes = float("inf")

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        self._arm()
        received: int = super().recv_into(buffer, nbytes, flags)  # type: ignore[misc]  # the socket this is mixed into
        self.allowed_bytes -= received
        if self.allowed_bytes < 0:
            raise InvalidResponse("a reply is longer than any value of ours")
        return received

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        self._arm()
        super().sendall(data, flags)  # type: ignore[misc]

    def _arm(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        self.settimeout(left)  # type: ignore[attr-defined]


class _DeadlineSocket(_Deadline, socket.socket):
    """Over TCP or a unix socket."""


class _DeadlineTlsSocket(_Deadline, ssl.SSLSocket):  # type: ignore[misc]  # typeshed lets it take None
    """Over TLS."""

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        # The library's own gives each piece that it sends the whole time-out.
        with memoryview(data) as whole, whole.cast("B") as view:
            sent = 0
            while sent < len(view):
                self._arm()
                sent += self.send(view[sent : sent + _TLS_WRITE_BYTES], flags)


class _DeadlineMixin:
    """Gives a redis-py connection a socket that knows its deadline."""

    deadline = float("inf")

    def _connect(self) -> socket.socket:
        plain: socket.socket = super()._connect()  # type: ignore[misc]  # the class this is mixed into has it
        guarded = _DeadlineSocket(plain.family, plain.type, plain.proto, plain.detach())
        guarded.deadline = self.deadline
        return guarded


class _TcpConnection(_DeadlineMixin, Connection):
    """Over TCP."""


class _UnixConnection(_DeadlineMixin, UnixDomainSocketConnection):
    """Over a unix socket."""


class _TlsConnection(Connection):
    """Over TLS. The files are read at every connection, so that renewed certificates are used from the next on."""

    deadline = float("inf")

    def __init__(self, *, tls: TlsFiles, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._tls = tls

    def _connect(self) -> socket.socket:
        plain: socket.socket = super()._connect()  # type: ignore[no-untyped-call]
        try:
            plain.settimeout(max(self.deadline - time.monotonic(), 1e-3))
            guarded = self._tls.context(_DeadlineTlsSocket).wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise
        guarded.deadline = self.deadline  # type: ignore[attr-defined]
        return guarded


class Link:
    """One connection, used by one thread at a time. Every method raises redis-py's errors."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection  # redis-py's connections are not typed

    @property
    def is_connected(self) -> bool:
        """Whether there is a socket; the server may have closed its end."""
        return bool(self._connection.is_connected)

    def connect(self, deadline: float) -> None:
        """Connect unless connected; this and everything after it ends by ``deadline``."""
        connection = self._connection
        connection.deadline = deadline
        connection.socket_connect_timeout = max(deadline - time.monotonic(), 1e-3)
        if connection.is_connected:
            connection._sock.deadline = deadline
        connection.connect()

    def disconnect_if_stale(self) -> None:
        """After a time of idleness: drop the socket if the server closed it or said what nobody asked for."""
        try:
            if self.is_connected and self._connection.can_read(0):
                self.disconnect()
        except RedisConnectionError:
            self.disconnect()

    def disconnect(self) -> None:
        """Drop the socket and with it all unread replies."""
        self._connection.disconnect()

    def send(self, commands: Iterable[tuple[bytes | memoryview, ...]]) -> None:
        """Send commands without waiting for replies. A memoryview of bytes goes out from where it lies."""
        self._connection.send_packed_command(self._connection.pack_commands(commands))

    def receive(self, max_bytes: float = float("inf")) -> Any:
        """The next reply: bytes, int or None. Raises ``ResponseError`` if it is an error; the link stays usable.

        One that is longer than ``max_bytes``, and than what is read at a time besides, is ``InvalidResponse``.
        """
        if self.is_connected:
            self._connection._sock.allowed_bytes = max_bytes + 2 * _READ_BYTES
        return self._connection.read_response()


class LinkPool:
    """Connections to one server, kept open between calls. Grows with the callers that work at the same time.

    Thread-safe.

    Args:
        url: how to log in, and over what.
        address: host and port of the server; None where the URL names a unix socket.
        tls: with whom to speak TLS, and as whom.
    """

    def __init__(self, url: RedisUrl, address: Address | None, tls: TlsFiles) -> None:
        self._class, self._options = _connection(url, address, tls)
        self._idle: deque[Link] = deque()
        self._closed = threading.Event()

    def acquire(self, deadline: float) -> Link:
        """A connected link for one thread, to be released. Raises redis-py's errors and the store's."""
        if self._closed.is_set():
            raise StoreUnavailableError("the Redis store is closed")
        if time.monotonic() >= deadline:
            raise StoreTimeoutError("no time was left to ask Redis")
        try:
            link = self._idle.pop()
        except IndexError:
            link = Link(self._class(**self._options))
        link.disconnect_if_stale()
        link.connect(deadline)
        return link

    def release(self, link: Link) -> None:
        """Keep a link for the next caller. One with unread replies must be disconnected before."""
        if link.is_connected:
            self._idle.append(link)
        if self._closed.is_set():
            self._disconnect_idle()

    def close(self) -> None:
        """Disconnect what is idle now and the rest when it is released. Idempotent."""
        self._closed.set()
        self._disconnect_idle()

    def _disconnect_idle(self) -> None:
        while True:
            try:
                self._idle.pop().disconnect()
            except IndexError:
                return


def _connection(url: RedisUrl, address: Address | None, tls: TlsFiles) -> tuple[type[Any], Mapping[str, Any]]:
    options: dict[str, Any] = {
        "db": url.database,
        "username": url.username,
        "password": url.password,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,  # the socket's own deadline rules
        "socket_read_size": _READ_BYTES,
        "command_packer": PythonRespSerializer(_COPY_BELOW_BYTES, _as_is),
        "protocol": 2,
        "driver_info": None,  # connecting costs no round trip
    }
    if address is None:
        return _UnixConnection, {**options, "path": url.path}
    options |= {"host": address[0], "port": address[1]}
    return (_TlsConnection, {**options, "tls": tls}) if url.is_tls else (_TcpConnection, options)


def _as_is(argument: Any) -> Any:
    """Our arguments are bytes and byte views already; redis-py's own handshake sends text and numbers."""
    return argument if isinstance(argument, (bytes, memoryview)) else str(argument).encode()
