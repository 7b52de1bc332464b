"""Several supervised processes: started together, stopped in an order, addressed by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from alora_serve.cli.local.events import Listening
from alora_serve.cli.local.process import Emit, ProcessSpec, RestartPolicy, SupervisedProcess
from alora_serve.cli.local.spawning import Spawn, spawn_tethered
from alora_serve.errors import InvalidRequestError


class Supervisor:
    """Keeps processes running. Belongs to one event loop."""

    def __init__(self, emit: Emit, policy: RestartPolicy | None = None, spawn: Spawn = spawn_tethered) -> None:
        """``emit`` is told everything that happens, on the loop's thread; it must not block or raise."""
        self._emit = emit
        self._policy = policy
        self._spawn = spawn
        self._processes: dict[str, SupervisedProcess] = {}

    @property
    def processes(self) -> Mapping[str, SupervisedProcess]:
        """By name, in the order of their start."""
        return self._processes

    def process(self, name: str) -> SupervisedProcess:
        """The process of that name.

        Raises:
            InvalidRequestError: there is none; lists the names there are.
        """
        if name not in self._processes:
            raise InvalidRequestError.of(
                "name", f"no process is named {name!r}; there are {', '.join(self._processes)}"
            )
        return self._processes[name]

    async def start(self, specs: Iterable[ProcessSpec]) -> list[Listening]:
        """Start processes side by side and wait until all listen.

        Raises:
            ConfigError: one ended before it listened. The others go on until stopped.
        """
        started = [SupervisedProcess(spec, self._emit, self._policy, self._spawn) for spec in specs]
        self._processes.update((process.name, process) for process in started)
        return list(await asyncio.gather(*(process.start() for process in started)))

    async def stop(self, stages: Sequence[Iterable[str]], *, timeout_seconds: float) -> None:
        """Drain stage after stage, the processes of one side by side; each is killed when its time is over."""
        for names in stages:
            running = [self._processes[name] for name in names if name in self._processes]
            await asyncio.gather(*(process.stop(timeout_seconds) for process in running))

    def abort(self) -> None:
        """End all of them now. Lets a :meth:`stop` in progress return at once."""
        for process in self._processes.values():
            process.abort()
