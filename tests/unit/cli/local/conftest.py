"""A small real process that listens nowhere but says so, and an ear for what its supervisor tells."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from alora_serve.cli.local.events import ProcessEvent
from alora_serve.cli.local.process import ProcessSpec, RestartPolicy, SupervisedProcess
from alora_serve.cli.local.supervisor import Supervisor

CHILD = '''
"""Says that it listens, then does what its first argument tells."""
import json, os, signal, sys, time
behaviour, *rest = sys.argv[1:]
asked = dict(zip(rest[0::2], rest[1::2]))
if behaviour == "refuse":
    print("error: model='x': no such directory", file=sys.stderr)
    sys.exit(2)
def ended(signum, frame):
    os.write(1, b"drained\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour in ("deaf", "mute") else ended)
def address(name):
    host, port = asked[name].rsplit(":", 1)
    return f"{host}:{port if int(port) else os.getpid()}"
print("loading", file=sys.stderr, flush=True)
if behaviour == "mute":
    time.sleep(600)
print(json.dumps({"event": "listening", "service": "child", "address": address("--listen"),
                  "metrics_address": address("--metrics-listen")}), flush=True)
if behaviour == "die":
    sys.exit(7)
if behaviour == "talk":
    print("\\rbar 1\\rbar 2\\rbar 3", file=sys.stderr)
    print("not json {", flush=True)
    print('["event", "listening"]', flush=True)
    sys.stderr.buffer.write(b"\\xff bad bytes\\n" + b"x" * (3 << 20) + b"\\nlast without an end")
    sys.stderr.flush()
time.sleep(600)
'''

Event = TypeVar("Event", bound=ProcessEvent)
QUICK = RestartPolicy(first_seconds=0.01, longest_seconds=0.05)


@dataclass(slots=True)
class Ear:
    """Collects events and lets a test wait for one."""

    events: list[ProcessEvent] = field(default_factory=list)
    _heard: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, event: ProcessEvent) -> None:
        self.events.append(event)
        self._heard.set()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    async def wait(self, kind: type[Event], count: int = 1) -> list[Event]:
        """All events of a kind once there are so many."""
        return await self.wait_until(kind, lambda heard: len(heard) >= count)

    async def wait_until(self, kind: type[Event], enough: Callable[[list[Event]], bool]) -> list[Event]:
        """All events of a kind once they are enough."""
        while not enough(self.of(kind)):
            self._heard.clear()
            await self._heard.wait()
        return self.of(kind)


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., ProcessSpec]:
    """Specs of the child: ``serve``, ``refuse``, ``mute`` (deaf and never listens), ``die``, ``deaf`` or ``talk``."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def make(behaviour: str = "serve", name: str = "child") -> ProcessSpec:
        return ProcessSpec(name, (sys.executable, "-I", "-S", str(script), behaviour), dict(os.environ))

    return make


@pytest.fixture
async def process(ear: Ear, spec: Callable[..., ProcessSpec]) -> AsyncIterator[Callable[[str], SupervisedProcess]]:
    """Makes supervised children and ends them with the test."""
    made: list[SupervisedProcess] = []

    def make(behaviour: str = "serve") -> SupervisedProcess:
        made.append(SupervisedProcess(spec(behaviour), ear, QUICK))
        return made[-1]

    yield make
    for one in made:
        one.abort()
        await one.stop(10)


@pytest.fixture
async def supervisor(ear: Ear) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(ear, QUICK)
    yield supervisor
    supervisor.abort()
    await supervisor.stop([supervisor.processes], timeout_seconds=10)
