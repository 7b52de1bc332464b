"""Connections to Redis whose every operation ends by one deadline, and that send values without copying them.

redis-py gives each single ``recv`` the whole time-out, so a server that trickles would be waited for without end. Here
the socket itself knows the deadline. redis-py with hiredis also packs commands in C, which copies each value once more;
the Python packer passes memoryviews through to ``sendall``. Both hang on hooks of redis-py that are not promised to
stay (``_connect``, ``command_packer``); tests hold them in force and the dependency is pinned to one minor version.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from redis.backoff import NoBackoff
from redis.connection import Connection, PythonRespSerializer, UnixDomainSocketConnection, parse_url
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry
from typing_extensions import Buffer

from alora_serve.errors import StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.store_url import url_error

_READ_BYTES = 1 << 18  # a value of 1 MiB in 4 reads instead of 32
_COPY_BELOW_BYTES = 6000  # the packer joins smaller arguments into one buffer
_URL_OPTIONS = frozenset({"host", "port", "path", "db", "username", "password", "connection_class"})


class _DeadlineSocket(socket.socket):
    """A socket whose reads and writes all end by ``deadline`` (``time.monotonic()``)."""

    deadline = float("inf")

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        self._arm()
        return super().recv_into(buffer, nbytes, flags)

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        self._arm()
        super().sendall(data, flags)

    def _arm(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        self.settimeout(left)


class _DeadlineMixin:
    """Gives a redis-py connection a :class:`_DeadlineSocket`."""

    deadline = float("inf")

    def _connect(self) -> _DeadlineSocket:
        plain: socket.socket = super()._connect()  # type: ignore[misc]  # the class this is mixed into has it
        guarded = _DeadlineSocket(plain.family, plain.type, plain.proto, plain.detach())
        guarded.deadline = self.deadline
        return guarded


class _TcpConnection(_DeadlineMixin, Connection):
    """Over TCP."""


class _UnixConnection(_DeadlineMixin, UnixDomainSocketConnection):
    """Over a unix socket."""


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

    def receive(self) -> Any:
        """The next reply: bytes, int or None. Raises ``ResponseError`` if it is an error; the link stays usable."""
        return self._connection.read_response()


class LinkPool:
    """Connections kept open between calls. Grows with the callers that work at the same time. Thread-safe.

    Args:
        url: ``redis://[user:password@]host[:port][/db]`` or ``unix://[user:password@]/path.sock[?db=n]``.
    """

    def __init__(self, url: str) -> None:
        self._class, self._options = _parse(url)
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


def _parse(url: str) -> tuple[type[_TcpConnection] | type[_UnixConnection], Mapping[str, Any]]:
    try:
        options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
        database = urlsplit(url).path.strip("/") if url.startswith("redis:") else ""
    except ValueError:  # its text may quote a part of the password
        raise url_error(url, "malformed; percent-encode special characters of user and password") from None
    if database and not database.isdecimal():
        raise url_error(url, "the database must be a number, as in redis://host:6379/0")
    unknown = sorted(options.keys() - _URL_OPTIONS)
    if unknown:
        raise url_error(url, f"unknown options {', '.join(unknown)}")
    connection_class = _UnixConnection if options.pop("connection_class", None) else _TcpConnection
    if connection_class is _UnixConnection and not options.get("path"):
        raise url_error(url, "needs the absolute path of a socket, as in unix:///run/valkey.sock")
    return connection_class, {
        **options,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,  # the socket's own deadline rules
        "socket_read_size": _READ_BYTES,
        "command_packer": PythonRespSerializer(_COPY_BELOW_BYTES, _as_is),
        "protocol": 2,
        "driver_info": None,  # connecting costs no round trip
    }


def _as_is(argument: Any) -> Any:
    """Our arguments are bytes and byte views already; redis-py's own handshake sends text and numbers."""
    return argument if isinstance(argument, (bytes, memoryview)) else str(argument).encode()
