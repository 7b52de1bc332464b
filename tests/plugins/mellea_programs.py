"""Programs of ``tests/interop/mellea``, in an environment of their own: mellea's pins are not ours."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "interop" / "mellea"
TOOLS = Path(os.environ.get("ALORA_TEST_TOOLS", ROOT / "build" / "tools"))
INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps", "-r")
TIMEOUT_SECONDS = 600


def run_mellea(program: str, given: object = None) -> Any:
    """Run a program on some input; both ways JSON. Skips the test where pip cannot fetch what it needs."""
    return json.loads(mellea_lines(program, given)[-1])  # mellea says things, too


def mellea_lines(program: str, given: object = None) -> list[str]:
    """All lines that a program prints; its input and skipping are those of :func:`run_mellea`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    result = subprocess.run(
        [_python(), PROGRAMS / program],
        input=json.dumps(given),
        env={**environment, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def _python() -> Path:
    """The Python of an environment as the lock file says."""
    lock = PROGRAMS / "requirements.lock"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = TOOLS / f"mellea-{version}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    place.mkdir(parents=True, exist_ok=True)
    python = place / "venv" / "bin" / "python"
    with FileLock(place / "lock"):
        if not (place / "done").exists():
            venv.create(place / "venv", with_pip=True, clear=True)
            command = [python, *INSTALL, lock]
            installed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            if installed.returncode:
                pytest.skip(f"pip could not install mellea: {installed.stderr.strip()[-500:]}")
            (place / "done").touch()
    return python
