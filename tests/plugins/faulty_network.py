"""A TCP proxy that a test makes slow, narrow, silent or dead: what networks do, between two real processes."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to bytes on their way, in both directions.

    Attributes:
        latency_seconds: before each piece is passed on.
        bytes_per_second: of each connection and direction; None is without limit.
        is_silent: nothing is passed on, nothing is closed: a partition.
        is_refusing: new connections are closed at once, old ones are cut.
    """

    latency_seconds: float = 0.0
    bytes_per_second: float | None = None
    is_silent: bool = False
    is_refusing: bool = False


CALM = Weather()


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts."""
    host, _, port = address.rpartition(":")
    return host, int(port)


class FaultyNetwork:
    """A proxy in front of one address while the block runs; ``weather`` may be set at any time."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._weather = CALM
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def address(self) -> str:
        """``host:port`` to connect to."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    @property
    def weather(self) -> Weather:
        """As it is."""
        return self._weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        with self._changed:
            self._weather = weather
            if weather.is_refusing:
                self._cut()
            self._changed.notify_all()

    def worsen(self, **changes: object) -> None:
        """Change some of it."""
        self.weather = replace(self._weather, **changes)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._cut()
            self._changed.notify_all()
        with suppress(OSError):
            socket.create_connection(self._listener.getsockname(), timeout=1).close()  # wakes the accepting thread
        self._listener.close()
        self._thread.join(timeout=5)

    def _cut(self) -> None:
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._closed:
                near.close()
                return
            if self._weather.is_refusing:
                near.close()
                continue
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._wait_while_silent()
        try:
            far = socket.create_connection(self._target, timeout=10)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._changed:
            self._connections |= {near, far}
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with closing(source), suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                weather = self._weather
                time.sleep(weather.latency_seconds)
                if weather.bytes_per_second:
                    time.sleep(len(data) / weather.bytes_per_second)
                self._wait_while_silent()
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with self._changed:
            self._connections.discard(source)

    def _wait_while_silent(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._weather.is_silent or self._closed)
