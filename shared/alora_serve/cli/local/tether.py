"""Becomes a given command that is killed when its supervisor dies, even by SIGKILL.

Run as a script, before the command, by :mod:`alora_serve.cli.local.supervisor`::

    python -I -S tether.py kernel|pipe SUPERVISOR_PID COMMAND...

It replaces itself by the command, so the command's process id is the one the supervisor got. Standard library only and
nothing of this package: it runs once a process start, without site packages. Coverage can't follow it there; what it
promises is held by tests/unit/cli/local/test_tether.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _ask_kernel(supervisor: int) -> None:  # pragma: no cover
    """Linux: the kernel kills this process, and what it becomes by exec, when the thread that started it ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != supervisor:  # it died before the kernel was asked
        sys.exit(1)


def _watch_pipe() -> None:  # pragma: no cover
    """Elsewhere: leave a watcher behind that reads standard input, whose other end only the supervisor holds."""
    watched = os.getpid()
    if os.fork() != 0:
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123  # pathlib is not worth its import time here
            os.dup2(nothing.fileno(), 0)
        return
    for output in (1, 2):  # the supervisor reads these until the command's end, not the watcher's
        os.close(output)
    os.setsid()
    while os.read(0, 4096):
        pass
    if os.getppid() == watched:  # otherwise it ended before, and its id may be somebody else's now
        os.kill(watched, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    mechanism, supervisor_pid, *command = sys.argv[1:]
    if mechanism == "kernel":
        _ask_kernel(int(supervisor_pid))
    else:
        _watch_pipe()
    os.execv(command[0], command)
