"""Start-up checks of the set-up script: each refusal names what is missing and what to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def setup(load_script: Any) -> Any:
    return load_script("setup_venv")


def test_an_old_python_is_refused_with_its_version_and_the_way_out(setup: Any) -> None:
    with pytest.raises(setup.SetupError, match=r"(?s)3\.11 or newer.*/usr/bin/python3 is 3\.9\.2.*make PYTHON="):
        setup.check_python((3, 9, 2), "/usr/bin/python3")
    setup.check_python((3, 11, 0), "python3")


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_refused_by_module_name(
    setup: Any, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = setup.importlib.util.find_spec
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(setup.SetupError, match=rf"(?s)lacks the module {module}.*apt install python3-venv"):
        setup.check_venv_module()


def test_a_full_disk_is_refused_with_the_space_found_and_needed(setup: Any, tmp_path: Path) -> None:
    with pytest.raises(setup.SetupError, match=r"has 1\.0 GiB free.*needs 4 GiB$"):
        setup.check_disk(tmp_path, 1024**3, setup.CPU_BUILD_BYTES)
    with pytest.raises(
        setup.SetupError, match=r"needs 12 GiB for the CUDA build.*CPU build needs 4 GiB.*TORCH_PIP_ARGS"
    ):
        setup.check_disk(tmp_path, setup.CPU_BUILD_BYTES, setup.CUDA_BUILD_BYTES)
    setup.check_disk(tmp_path, setup.CPU_BUILD_BYTES, setup.CPU_BUILD_BYTES)


@pytest.mark.parametrize(
    ("system", "machine", "torch_pip_args", "gib"),
    [
        ("Linux", "x86_64", "", 12),
        ("Linux", "x86_64", "--index-url cpu", 4),
        ("Linux", "aarch64", "", 4),
        ("Darwin", "x86_64", "", 4),
    ],
)
def test_room_is_asked_for_the_build_of_torch_that_pip_takes(
    setup: Any, system: str, machine: str, torch_pip_args: str, gib: int
) -> None:
    assert setup.needed_bytes(system, machine, torch_pip_args) == gib * 1024**3


def test_an_unwritable_directory_is_refused(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(setup.SetupError, match="is not writable"):
        setup.check_disk(tmp_path, 1, 1)


def test_the_steps_run_in_the_order_that_keeps_torch_the_chosen_build(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    versions: list[str | None] = []

    def run(command: list[str], *, env: Mapping[str, str] | None = None, check: bool) -> None:
        assert check
        commands.append(command)
        versions.append((env or {}).get("TORCH_VERSION"))

    monkeypatch.setattr(setup.subprocess, "run", run)
    setup.install(tmp_path, tmp_path, "torch==1", "--index-url 'a b'", tmp_path / "x.lock")
    locked, torch, project, check = commands
    assert versions == [None, "1", None, None]
    assert locked[-5:] == ["--quiet", "--require-hashes", "--no-deps", "-r", str(tmp_path / "x.lock")]
    assert torch[1] == str(tmp_path / "scripts" / "install_torch.sh")
    assert torch[-2:] == ["--index-url", "a b"]
    assert project[-4:-1] == ["--no-deps", "--no-build-isolation", "--editable"]
    assert check[-1] == "check"


def test_a_failing_pip_is_reported_by_its_command_without_a_traceback(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(setup, "create", lambda venv, needed: None)
    monkeypatch.setattr(setup.subprocess, "run", fail)
    arguments = ["--venv", str(tmp_path), "--lock", "x.lock", "--torch", "torch==1"]
    assert setup.main(arguments) == 1
    assert "x.lock exited 2" in capsys.readouterr().err


def test_a_broken_environment_is_made_anew_and_a_usable_one_is_kept(setup: Any, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "uninstalled")
    setup.create(tmp_path / "venv", 1)
    subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True)
    marker = tmp_path / "venv" / "marker"
    marker.touch()
    setup.create(tmp_path / "venv", 1)
    assert marker.exists()
