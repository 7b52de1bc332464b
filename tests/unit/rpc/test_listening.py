"""Signals end a process that does not serve yet, also where it is the first one of a container."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOADING = """
import sys, time
from alora_serve.rpc.listening import end_on_signals
{install}
print("loading", flush=True)
time.sleep(60)
"""
AS_FIRST = ("unshare", "--fork", "--pid", "--kill-child")


def loading(install: str, *prefix: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*prefix, sys.executable, "-c", LOADING.format(install=install)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_loads_dies_of_the_signal_it_is_sent(number: signal.Signals) -> None:
    with loading("end_on_signals()") as process:
        process.send_signal(number)
        assert process.wait(timeout=20) == -number


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_the_first_process_of_a_container_ends_too() -> None:
    for install, ends in (("", False), ("end_on_signals()", True)):
        with loading(install, *AS_FIRST) as outer:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            assert len(children) == 1
            os.kill(int(children[0]), signal.SIGTERM)
            if ends:
                assert outer.wait(timeout=20) == 128 + signal.SIGTERM
            else:
                time.sleep(1.0)
                assert outer.poll() is None, "the kernel spares it"
                outer.kill()
