"""The container stage says aloud that it has done nothing, and counts as failed where programs could be installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGE = Path(__file__).resolve().parents[3] / "tests" / "containers" / "run_stage.py"


@pytest.mark.parametrize(("required", "status"), [("", 0), ("1", 1)])
def test_without_the_programs_it_skips_aloud(required: str, status: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "ALORA_TEST_REQUIRE_ALL": required}
    done = subprocess.run([sys.executable, STAGE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "SKIPPED: make containers has built and tested NOTHING: it needs apt install" in done.stdout
    assert "buildah" in done.stdout


def test_what_is_missing_is_listed_for_who_installs_it(tmp_path: Path) -> None:
    command = [sys.executable, STAGE, "--missing"]
    done = subprocess.run(
        command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert {"buildah", "podman", "mmdebstrap"} <= set(done.stdout.split())
