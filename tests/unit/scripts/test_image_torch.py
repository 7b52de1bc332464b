"""Images get the torch that was asked for: scripts/install_torch.sh, and the digest that build_images.py gives it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

WHEEL = "the wheel of torch"
DIGEST = hashlib.sha256(WHEEL.encode()).hexdigest()
PIP = f"""#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
[ "$1" != download ] || printf %s '{WHEEL}' > "$3/torch-2.13.0+cpu-cp311.whl"
"""
"""Tells how it was called; what it downloads is always the same."""
ENGINE = """#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$*" in "image inspect"*) echo "$SIZES" ;; esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@dataclass(frozen=True, slots=True)
class Installer:
    """scripts/install_torch.sh, with a pip that is none."""

    root: Path
    at: Path

    def __call__(self, **variables: str) -> tuple[int, list[str]]:
        """Its exit status, and the calls of pip."""
        pip = program(self.at / "venv" / "bin" / "pip", PIP)
        (self.at / "wheels").mkdir(exist_ok=True)
        (self.at / "temporary").mkdir(exist_ok=True)
        command = ["sh", self.root / "scripts" / "install_torch.sh", self.at / "venv", self.at / "wheels"]
        environment = {"PATH": os.environ["PATH"], "TMPDIR": str(self.at / "temporary"), "TORCH_VERSION": "2.13.0"}
        done = subprocess.run(command, env=environment | variables, capture_output=True, check=False)
        return done.returncode, pip.with_name("calls").read_text().splitlines()


@pytest.fixture
def install(pytestconfig: pytest.Config, tmp_path: Path) -> Installer:
    return Installer(pytestconfig.rootpath, tmp_path)


@pytest.mark.parametrize("digest", [DIGEST, ""])
def test_torch_of_the_digest_or_of_none_is_installed_from_what_was_fetched_alone(
    digest: str, install: Installer, tmp_path: Path
) -> None:
    status, [download, installed] = install(TORCH_SHA256=digest, TORCH_PIP_ARGS="--index-url https://example.com/cpu")
    assert status == 0
    folder = download.split()[2]
    assert download == f"download --dest {folder} torch==2.13.0 --index-url https://example.com/cpu"
    assert installed == f"install --no-index --find-links {folder} torch==2.13.0"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_another_torch_ends_the_build_before_it_is_installed(install: Installer) -> None:
    status, [download] = install(TORCH_SHA256=hashlib.sha256(b"another").hexdigest())
    assert status != 0
    assert download.startswith("download")


def test_wheels_that_are_handed_over_are_taken_and_nothing_else(install: Installer, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.13.0-cp311.whl").touch()
    status, [download, _] = install()
    assert status == 0
    assert download.endswith(f"torch==2.13.0 --no-index --find-links {tmp_path / 'wheels'}")


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
    assert not any("TORCH_SHA256" in line for line in builds if line not in ours)
