"""A supervisor in a process of its own is killed; its children must not outlive it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from alora_serve.cli.local import tether

SUPERVISOR = """
import json, os, subprocess, sys, time
tether, mechanism = sys.argv[1:]
child = subprocess.Popen(
    [sys.executable, "-I", "-S", tether, mechanism, str(os.getpid()),
     sys.executable, "-I", "-S", "-c", "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
print(json.dumps([child.pid, int(child.stdout.readline())]), flush=True)
time.sleep(600)
"""

MECHANISMS = [
    pytest.param("kernel", marks=pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")),
    "pipe",
]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_child_dies_with_its_supervisor(mechanism: str) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, tether.__file__, mechanism], stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout is not None
    spawned, reported = json.loads(supervisor.stdout.readline())
    assert spawned == reported, "the command must have the process id that its supervisor knows"
    child = psutil.Process(reported)
    supervisor.kill()
    supervisor.wait()
    _wait_until_gone(child)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_child_that_ends_by_itself_leaves_nothing_behind(mechanism: str, tmp_path: Path) -> None:
    others = {process.pid for process in psutil.Process().children(recursive=True)}
    command = [sys.executable, "-I", "-S", "-c", "print('done')"]
    done = subprocess.Popen(
        [sys.executable, "-I", "-S", tether.__file__, mechanism, str(os.getpid()), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout is not None
    assert done.stdout.read() == "done\n", "its output ends with it, whoever watches"
    assert done.wait() == 0
    assert done.stdin is not None
    done.stdin.close()
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= others


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_a_supervisor_that_died_before_the_kernel_was_asked_is_noticed() -> None:
    gone = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    gone.wait()
    command = [sys.executable, "-I", "-S", "-c", "print('orphan')"]
    orphan = subprocess.run(
        [sys.executable, "-I", "-S", tether.__file__, "kernel", str(gone.pid), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (orphan.returncode, orphan.stdout) == (1, "")


def _wait_until_gone(process: psutil.Process) -> None:
    """A zombie that nobody reaps counts as gone: in a container, init may be slow or absent."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {process.pid} outlived its supervisor")
