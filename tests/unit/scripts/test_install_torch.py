"""scripts/install_torch.sh, by the real pip: torch comes as asked for, and changes nothing of what is locked."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

LOCKED = {"locked": "1"}


def write_wheel(folder: Path, name: str, version: str, *requirements: str) -> Path:
    """A package of nothing but what it says of itself."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", f"Version: {version}"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{about}/METADATA", "\n".join([*metadata, *(f"Requires-Dist: {r}" for r in requirements)]))
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with ``LOCKED`` in it, and a folder of wheels that may be installed."""

    script: Path
    at: Path

    @property
    def wheels(self) -> Path:
        return self.at / "wheels"

    def run(self, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        apart = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "TMPDIR": str(self.at)}
        return subprocess.run(command, env=apart | variables, capture_output=True, text=True, check=False)

    def install(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """What the script says."""
        told = arguments or (self.wheels,)
        return self.run("sh", self.script, self.at / "venv", *told, TORCH_VERSION="2.13.0", **variables)

    def held(self) -> dict[str, str]:
        """Versions of what is installed."""
        listed = json.loads(self.run(self.at / "venv" / "bin" / "pip", "list", "--format=json").stdout)
        return {package["name"]: package["version"] for package in listed}


@pytest.fixture
def environment(pytestconfig: pytest.Config, tmp_path: Path) -> Environment:
    venv, pip = tmp_path / "venv", tmp_path / "venv" / "bin" / "pip"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {venv} "$@"\n')
    pip.chmod(0o755)
    made = Environment(pytestconfig.rootpath / "scripts" / "install_torch.sh", tmp_path)
    write_wheel(made.wheels, "locked", "2")
    done = made.run(pip, "install", write_wheel(tmp_path / "of-the-lock", "locked", "1"))
    assert done.returncode == 0, done.stderr
    return made


def test_torch_brings_what_it_computes_on_gpus_with_and_finds_the_rest(environment: Environment) -> None:
    write_wheel(environment.wheels, "nvidia_cublas", "13", "cuda-toolkit")
    write_wheel(environment.wheels, "cuda_toolkit", "13")
    write_wheel(environment.wheels, "torch", "2.13.0+cu130", "locked", "nvidia-cublas")
    done = environment.install()
    assert done.returncode == 0, done.stderr
    assert environment.held() == LOCKED | {"torch": "2.13.0+cu130", "nvidia-cublas": "13", "cuda-toolkit": "13"}
    assert environment.install().returncode == 0, "a second time"


def test_torch_comes_from_where_the_arguments_point(environment: Environment, tmp_path: Path) -> None:
    write_wheel(tmp_path / "an index", "torch", "2.13.0")
    done = environment.install(tmp_path / "no-wheels", "--no-index", "--find-links", tmp_path / "an index")
    assert done.returncode == 0, done.stderr
    assert environment.held() == LOCKED | {"torch": "2.13.0"}


def test_only_torch_of_the_digest_is_installed(environment: Environment) -> None:
    wheel = write_wheel(environment.wheels, "torch", "2.13.0", "locked")
    refused = environment.install(TORCH_SHA256=hashlib.sha256(b"another").hexdigest())
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert environment.held() == LOCKED
    done = environment.install(TORCH_SHA256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    assert environment.held() == LOCKED | {"torch": "2.13.0"}


def test_torch_replaces_nothing_that_is_locked(environment: Environment) -> None:
    write_wheel(environment.wheels, "torch", "2.13.0", "locked>=2")
    assert environment.install().returncode != 0
    assert environment.held()["locked"] == "1"


def test_what_torch_needs_and_nobody_locked_is_named(environment: Environment) -> None:
    write_wheel(environment.wheels, "stray", "3")
    write_wheel(environment.wheels, "torch", "2.13.0", "locked", "stray")
    done = environment.install()
    assert done.returncode != 0
    assert done.stderr.splitlines()[-2] == "stray==3"
    assert "not locked" in done.stderr
