"""A system in a process of its own, asked by JSON lines: neither side shares memory or threads with the other.

The child (:mod:`systems.answering`) reads one JSON object a line from standard input and answers each with one line on
standard output: ``{"result": ...}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from alora_serve.cli.local.machine import service_environment

_LINE_BYTES = 1 << 26
"""Longest line: a few prompts of thousands of tokens."""
_EXIT_SECONDS = 20.0
_BENCHMARKS = Path(__file__).resolve().parent.parent

Environment = Callable[[Mapping[str, str]], Mapping[str, str]]


def our_environment(base: Mapping[str, str]) -> Mapping[str, str]:
    """As the launcher starts our services."""
    return service_environment(base, threads=0)


class Child:
    """One child process while the block runs; requests go to it one at a time, as to a program behind a lock.

    Attributes:
        facts: the child's environment, as far as figures depend on it, and its number of torch threads.
    """

    def __init__(self, module: str, settings: Mapping[str, object], environment: Environment = our_environment) -> None:
        """``settings`` is the child's one argument, as JSON; ``environment`` makes its environment from ours."""
        # -P: the directory of a module must not stand in for packages of the same names.
        self._command = (sys.executable, "-P", "-m", module, json.dumps(settings))
        self._program = module
        self._environment = environment
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self.facts: dict[str, object] = {}

    async def __aenter__(self) -> Child:
        path = os.pathsep.join(filter(None, [str(_BENCHMARKS), os.environ.get("PYTHONPATH")]))
        # Their warnings about each other's names are no news here.
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
        here = {**os.environ, **quiet, "PYTHONPATH": path}
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            limit=_LINE_BYTES,
            env=self._environment(here),
        )
        try:
            self.facts = await self.ask({"do": "ready"})
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if process.stdin:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _EXIT_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def ask(self, request: Mapping[str, object]) -> Any:
        """What the child answers.

        Raises:
            RuntimeError: it failed, or is gone.
        """
        async with self._lock:
            if self._process is None or self._process.stdin is None or self._process.stdout is None:
                raise RuntimeError(f"{self._program} is not running")
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._program} ended while it was asked; its standard error says why")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self._program}: {answer['error']}")
        return answer["result"]


class ChildSystem:
    """A system that is one child, ready when the block begins and gone when it ends."""

    def __init__(self, module: str, settings: Mapping[str, object], environment: Environment = our_environment) -> None:
        self._child = Child(module, settings, environment)

    @property
    def facts(self) -> dict[str, object]:
        """What figures depend on, for the JSON file."""
        return self._child.facts

    async def __aenter__(self) -> Self:
        await self._child.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._child.__aexit__(*error)
