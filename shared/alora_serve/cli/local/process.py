"""One process that is kept running: started, followed, restarted on the same addresses, drained or killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Final

from alora_serve.cli.local.events import Exited, Listening, LogLine, ProcessEvent, Spawned, StartError
from alora_serve.cli.local.spawning import Child, Spawn, spawn_tethered
from alora_serve.errors import AloraServeError, UnavailableError

Emit = Callable[[ProcessEvent], None]

_MAX_LINE_BYTES: Final = 1 << 20
_KEPT_LINES: Final = 20
_LAST_OUTPUT_SECONDS: Final = 1.0
"""After a process ended, how long its pipes are read on: a process that it started may hold them open."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run. The command must take ``--listen`` and ``--metrics-listen``, and print a line when it listens.

    Attributes:
        name: unique among the supervised.
        command: program (an absolute path) and arguments.
        environment: the whole environment.
        listen: ``host:port``; port 0 takes a free one at the first start, and keeps it.
        metrics_listen: the same for Prometheus.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How long to wait before a restart: ``first_seconds``, doubled for each death in a row, up to ``longest_seconds``.

    A process that has listened for ``forget_after_seconds`` starts the count anew.
    """

    first_seconds: float = 0.1
    longest_seconds: float = 10.0
    forget_after_seconds: float = 30.0

    def delay_seconds(self, deaths: int) -> float:
        """The wait after so many deaths in a row, >= 1."""
        return min(self.first_seconds * 2.0 ** min(deaths - 1, 30), self.longest_seconds)


class SupervisedProcess:
    """Keeps one process running until told to stop.

    Belongs to one event loop. On Linux, the thread of that loop must live as long as the process: when it ends, the
    kernel takes that for the supervisor's death.
    """

    def __init__(
        self, spec: ProcessSpec, emit: Emit, policy: RestartPolicy | None = None, spawn: Spawn = spawn_tethered
    ) -> None:
        self.name = spec.name
        self._spec = spec
        self._emit = emit
        self._policy = policy or RestartPolicy()
        self._spawn = spawn
        self._addresses = (spec.listen, spec.metrics_listen)
        self._process: Child | None = None
        self._life: asyncio.Task[None] | None = None
        self._listening: asyncio.Future[Listening] = asyncio.get_running_loop().create_future()
        self._listening_since: float | None = None
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._stop = asyncio.Event()
        self._restarting = False

    @property
    def pid(self) -> int | None:
        """Of the process as it runs now; None between two lives."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def environment(self) -> Mapping[str, str]:
        """What a fresh process would get."""
        return self._spec.environment

    @property
    def listening(self) -> Listening | None:
        """Where it listens now, if it does."""
        failed = not self._listening.done() or self._listening.exception() is not None
        return None if failed else self._listening.result()

    async def start(self) -> Listening:
        """Start it and wait until it listens.

        Raises:
            StartError: it ended before; carries the last lines it wrote.
        """
        if self._life is None:
            self._life = asyncio.create_task(self._live(), name=f"supervise {self.name}")
        return await self.wait_listening()

    async def wait_listening(self) -> Listening:
        """Where it listens, as soon as it does. Raises as :meth:`start`, or UnavailableError once it was stopped."""
        listening, life = self._listening, self._life
        if life is None:
            raise UnavailableError(f"{self.name} was not started")
        either: list[asyncio.Future[Any]] = [listening, life]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            life.result()  # a bug of the supervision itself must not leave anybody waiting
        return self._listening.result() if life.done() else listening.result()

    def send_signal(self, number: int) -> None:
        """Signal the process as it runs now.

        Raises:
            UnavailableError: it is not running.
        """
        pid = self.pid
        try:
            if pid is None:
                raise ProcessLookupError
            # Not Process.send_signal: it polls, and may take the exit status away from asyncio's own watcher.
            os.kill(pid, number)
        except ProcessLookupError as error:
            raise UnavailableError(f"{self.name} is not running") from error

    async def kill(self) -> None:
        """SIGKILL it and return when it is dead. It is started again as after any death.

        Raises:
            UnavailableError: it is not running.
        """
        self.send_signal(signal.SIGKILL)
        self._forget_listening()
        if self._process is not None:
            await self._process.wait()

    async def restart(self, environment: Mapping[str, str] | None = None) -> Listening:
        """Let it drain, start a fresh one on the same addresses, and return when that listens.

        ``environment``: the whole one of the fresh process and those after it; unset: as it was.
        """
        if environment is not None:
            self._spec = replace(self._spec, environment=environment)
        self._restarting = True
        self._forget_listening()
        with suppress(UnavailableError):  # it is between two lives: the next one is fresh as well
            self.send_signal(signal.SIGTERM)
        return await self.wait_listening()

    async def stop(self, timeout_seconds: float) -> None:
        """Let it drain and end for good; SIGKILL when the time is over."""
        self._stop.set()
        if self._life is None:
            return
        with suppress(UnavailableError):
            self.send_signal(signal.SIGTERM)
        await asyncio.wait([self._life], timeout=timeout_seconds)
        self.abort()
        await self._life

    def abort(self) -> None:
        """End it for good, now."""
        self._stop.set()
        with suppress(UnavailableError):
            self.send_signal(signal.SIGKILL)

    # --- its lives ----------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        deaths = 0
        has_listened = False
        while True:
            process = await self._start_fresh()
            await self._follow(process)
            status = await process.wait()
            listened_seconds = 0.0 if self._listening_since is None else monotonic() - self._listening_since
            has_listened |= self._listening_since is not None
            deaths = 1 if listened_seconds >= self._policy.forget_after_seconds else deaths + 1
            delay = 0.0 if self._restarting else self._policy.delay_seconds(deaths)
            ends = self._stop.is_set() or not has_listened
            expected = self._stop.is_set() or self._restarting
            self._forget_listening()
            self._emit(Exited(self.name, process.pid, status, expected, None if ends else delay))
            if ends or await self._told_to_stop_within(delay):
                self._fail_waiters(status)
                return

    async def _start_fresh(self) -> Child:
        self._last_lines.clear()
        self._listening_since = None
        self._restarting = False
        listen, metrics_listen = self._addresses
        command = (*self._spec.command, "--listen", listen, "--metrics-listen", metrics_listen)
        process = await self._spawn(command, self._spec.environment)
        self._process = process
        self._emit(Spawned(self.name, process.pid))
        if self._stop.is_set():
            process.kill()
        return process

    async def _follow(self, process: Child) -> None:
        """Pass on what the process writes until it has ended."""
        if process.stdout is None or process.stderr is None:
            raise RuntimeError("the process was started without pipes")
        pumps = [
            asyncio.create_task(self._pump_output(process.stdout, process.pid)),
            asyncio.create_task(self._pump_log(process.stderr)),
        ]
        await process.wait()
        await asyncio.wait(pumps, timeout=_LAST_OUTPUT_SECONDS)
        for pump in pumps:
            pump.cancel()

    async def _pump_output(self, stream: asyncio.StreamReader, pid: int) -> None:
        async for line in _lines(stream):
            addresses = _listening_addresses(line)
            if addresses is None:
                self._log(line)
                continue
            self._addresses = addresses
            self._listening_since = monotonic()
            listening = Listening(self.name, pid, *addresses)
            self._emit(listening)
            if not self._listening.done():
                self._listening.set_result(listening)

    async def _pump_log(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self._log(line)

    def _log(self, line: str) -> None:
        self._last_lines.append(line)
        self._emit(LogLine(self.name, line))

    async def _told_to_stop_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        return self._stop.is_set()

    def _forget_listening(self) -> None:
        if self._listening.done():
            self._listening = asyncio.get_running_loop().create_future()

    def _fail_waiters(self, status: int) -> None:
        error: AloraServeError = UnavailableError(f"{self.name} was stopped")
        if not self._stop.is_set():
            wrote = "\n".join(self._last_lines) or "it wrote nothing"
            error = StartError(f"{self.name} did not start (exit status {status})", wrote)
        self._listening.set_exception(error)
        self._listening.exception()  # seen: nobody has to be waiting


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines as they come, however long; one without an end is cut every megabyte, since it must not fill the memory.

    What a carriage return would overwrite on a terminal, such as earlier states of a progress bar, is left out.
    """
    rest = b""
    while chunk := await stream.read(1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            whole, rest = [*whole, rest], b""
        for line in whole:
            yield _shown(line)
    if rest:
        yield _shown(rest)


def _shown(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def _listening_addresses(line: str) -> tuple[str, str] | None:
    """Address and metrics address, where the line is the one that says so."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("event") != "listening":
        return None
    return record["address"], record["metrics_address"]
