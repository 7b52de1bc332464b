"""Pytest plugin: services that tests deploy start from one warm process of the test run's own, in a tenth of the time.

Importing torch and the rest takes 4 to 10 s of CPU in every process. A process that has done so forks them instead:
see :mod:`warm_server`. What is forked is a service like any other: a process with an environment, arguments, a session
and outputs of its own, which signals stop and kill, and whose coverage is measured. What is not tested with it is the
import itself: so some tests start services as users do, those of the command line and of the services' own start, and
all of ``make chaos``. ``ALORA_TEST_COLD_START=1`` makes every start such a one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

import warm_server
from alora_serve.cli.local import machine
from alora_serve.cli.local.spawning import Child, spawn_tethered

VARIABLE = "ALORA_TEST_COLD_START"
SERVICES = ("base_prefill", "adapter_decode", "adapter_router")
READ_LATE = ("ALORA_", "OTEL_", "PYTEST_")
"""Prefixes of variables that nothing reads before a service's ``main``. All others must be as in the warm process: some
are read at import (``OMP_WAIT_POLICY``), others by the loader or by the allocator (``MALLOC_*``)."""
OTEL_READ_EARLY = "OTEL_PYTHON_"
START_SECONDS = 120.0


class WarmChild:
    """A forked service: a :class:`~alora_serve.cli.local.spawning.Child`."""

    def __init__(
        self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader, news: asyncio.StreamReader
    ) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._ending = asyncio.create_task(self._end(news), name=f"wait for {pid}")

    async def wait(self) -> int:
        return await asyncio.shield(self._ending)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def _end(self, news: asyncio.StreamReader) -> int:
        # No news: the warm process is gone, and the kernel has killed what it had forked.
        self.returncode = int(await news.readline() or -signal.SIGKILL)
        return self.returncode


class WarmServer:
    """The warm process. Any thread and loop may use it.

    Args:
        services: what it can become.
        variables: its environment; unset: that of services which compute on one thread.
    """

    def __init__(self, services: Sequence[str] = SERVICES, variables: Mapping[str, str] | None = None) -> None:
        base = os.environ if variables is None else variables
        self.services = tuple(services)
        self.environment = machine.service_environment(_read_early(base), threads=1)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(warm_server.__file__)), str(theirs.fileno()), *services],
                env=self.environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C in the terminal is for the tests, which stop what they started
            )
        self._control.settimeout(START_SECONDS)
        if not self._control.recv(16):
            raise self._ended()

    async def spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """A :class:`~alora_serve.cli.local.spawning.Spawn`: warm where that makes no difference, else cold."""
        is_service = (*command[:3],) == (sys.executable, "-P", "-m") and command[3] in self.services
        if not is_service or _read_early(environment) != self.environment:
            return await spawn_tethered(command, environment)
        asked = {
            "module": command[3],
            "arguments": command[4:],
            "environment": dict(environment),
            "directory": str(Path.cwd()),
        }
        pipes = [os.pipe() for _ in ("stdout", "stderr", "news")]
        with open(os.devnull, "rb") as nothing:  # noqa: ASYNC230, PTH123  # no wait
            try:
                packet = json.dumps(asked).encode()
                socket.send_fds(self._control, [packet], [nothing.fileno(), *(write for _, write in pipes)])
            except BrokenPipeError as error:
                raise self._ended() from error
            finally:
                for _, write in pipes:
                    os.close(write)
        stdout, stderr, news = [await _reader(read) for read, _ in pipes]
        pid = await news.readline()
        if not pid:
            raise self._ended()
        return WarmChild(int(pid), stdout, stderr, news)

    def close(self) -> None:
        """End it, and all that it has forked."""
        self._control.close()
        self.process.wait(START_SECONDS)
        self._log.close()

    def _ended(self) -> RuntimeError:
        status = self.process.wait(START_SECONDS)
        self._log.seek(0)
        return RuntimeError(f"the warm process ended (exit status {status}):\n{self._log.read().decode()}")


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    """What of it may have been read before a service's ``main`` runs."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(OTEL_READ_EARLY) or not name.startswith(READ_LATE)
    }


async def _reader(file: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(file, "rb")
    )
    return reader


class _Shared:
    """The one warm process of this test run (of this worker, with xdist), started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: WarmServer | None = None

    def get(self) -> WarmServer:
        with self._lock:
            self._server = self._server or WarmServer()
            return self._server

    def close(self) -> None:
        with self._lock:
            if self._server is not None:
                self._server.close()
                self._server = None


_shared = _Shared()


async def spawn(command: Sequence[str], environment: Mapping[str, str]) -> Child:
    """A :class:`~alora_serve.cli.local.spawning.Spawn` for whatever tests deploy."""
    if sys.platform != "linux" or os.environ.get(VARIABLE) == "1":
        return await spawn_tethered(command, environment)
    server = await asyncio.to_thread(_shared.get)
    return await server.spawn(command, environment)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the warm process, which then saves what coverage it measured."""
    _shared.close()
