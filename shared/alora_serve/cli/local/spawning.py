"""How a supervised process comes to be: a fresh interpreter, unless its supervisor is given another way."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from alora_serve.cli.local import tether

TETHER: Final = "kernel" if sys.platform == "linux" else "pipe"
"""How children learn of the supervisor's death; see :mod:`alora_serve.cli.local.tether`."""


class Child(Protocol):
    """A started process, as :class:`asyncio.subprocess.Process` is one. Belongs to the loop it was started on."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative is the number of the signal that killed it."""
        ...

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """Its standard output, where it is a pipe."""
        ...

    @property
    def stderr(self) -> asyncio.StreamReader | None:
        """Its standard error, where it is a pipe."""
        ...

    async def wait(self) -> int:
        """Wait for its end; the ``returncode``."""
        ...

    def kill(self) -> None:
        """SIGKILL it."""
        ...


class Spawn(Protocol):
    """Starts processes. Two supervisors may share one."""

    async def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start a process whose outputs are pipes, in a session of its own, which never outlives the caller's process.

        Args:
            command: program (an absolute path) and arguments.
            environment: the whole environment.

        Raises:
            OSError: the system has no room for it.
        """
        ...


async def spawn_tethered(command: Sequence[str], environment: Mapping[str, str]) -> Child:
    """A :class:`Spawn`: the command in a process of its own, tied to the calling thread or process by the tether."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(Path(tether.__file__)), TETHER, str(os.getpid())),
        *command,
        stdin=PIPE,  # never written: the other end of the tether
        stdout=PIPE,
        stderr=PIPE,
        env=dict(environment),
        start_new_session=True,  # Ctrl-C in the terminal is for the supervisor, which drains in order
    )
