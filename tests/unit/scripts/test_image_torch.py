"""Images are built with the digest of the torch that was fetched for them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WHEEL = "the wheel of torch"
DIGEST = hashlib.sha256(WHEEL.encode()).hexdigest()
ENGINE = """#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$*" in "image inspect"*) echo "$SIZES" ;; esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_images_are_built_with_the_digest_of_the_wheel_that_was_fetched(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    fetched = tmp_path / "folder" / "wheels" / "torch-2.13.0+cpu-cp311.whl"
    program(fetched, WHEEL)
    for name in ("buildah", "podman"):
        program(tmp_path / "bin" / name, ENGINE)
    told = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SIZES": json.dumps([{"Size": 1}] * 7),
    }
    script = pytestconfig.rootpath / "scripts" / "build_images.py"
    command = [sys.executable, script, "--folder", tmp_path / "folder", "--torch", "torch==2.13.0"]
    subprocess.run(command, env={**os.environ, **told}, check=True, capture_output=True)
    builds = [line for line in (tmp_path / "calls").read_text().splitlines() if "buildah build" in line]
    ours = [line for line in builds if "deploy/docker/Dockerfile" in line]
    assert len(ours) == 5
    assert all(f"--build-arg TORCH_SHA256={DIGEST} " in line for line in ours)
    assert all("--build-arg PIP_INDEX_URL " in line for line in ours), "by name: its value may hold a password"
    assert not any("TORCH_SHA256" in line for line in builds if line not in ours)
