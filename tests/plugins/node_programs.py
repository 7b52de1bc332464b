"""Node programs of ``tests/interop/node``; the packages that they need npm fetches once, into ``build/tools``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "interop" / "node"
TOOLS = Path(os.environ.get("ALORA_TEST_TOOLS", ROOT / "build" / "tools"))
INSTALL = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-progress")
TIMEOUT_SECONDS = 120


def run_node(program: str, given: object) -> Any:
    """Run a program on some input; both ways JSON. Skips the test where there is no Node, or npm cannot fetch."""
    if shutil.which("node") is None:
        pytest.skip("no node: install Node.js 18 or newer")
    result = subprocess.run(
        ["node", PROGRAMS / program],
        input=json.dumps(given),
        env={**os.environ, "NODE_PATH": str(_packages())},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _packages() -> Path:
    """``node_modules`` as the lock file says, apart from the sources."""
    lock = PROGRAMS / "package-lock.json"
    place = TOOLS / f"node-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        if not (place / "done").exists():
            if shutil.which("npm") is None:
                pytest.skip("no npm, which fetches the packages of tests/interop/node")
            for file in (PROGRAMS / "package.json", lock):
                shutil.copy(file, place)
            installed = subprocess.run(
                INSTALL, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
            if installed.returncode:
                pytest.skip(f"npm could not fetch the packages of tests/interop/node: {installed.stderr.strip()}")
            (place / "done").touch()
    return place / "node_modules"
