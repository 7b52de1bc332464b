"""Bills of materials name the Python that an image brings and what lies beside it, not the environment alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def write_sbom(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("write_sbom")


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_packages_beside_an_own_python_are_listed_with_those_of_the_environment(
    write_sbom: ModuleType, tmp_path: Path
) -> None:
    environment = folder(tmp_path / "venv" / "lib" / "python3.11" / "site-packages")
    own = folder(tmp_path / "usr" / "local" / "lib" / "python3.11" / "site-packages")
    folder(tmp_path / "usr" / "lib" / "python3" / "dist-packages")
    assert write_sbom.site_packages(tmp_path) == [own, environment]


def test_a_python_that_no_package_of_debian_brings_is_named_with_its_version(
    write_sbom: ModuleType, tmp_path: Path
) -> None:
    assert write_sbom.interpreters(tmp_path) == []
    headers = folder(tmp_path / "usr" / "local" / "include" / "python3.11")
    (headers / "patchlevel.h").write_text(
        '#define PY_MICRO_VERSION 14\n/* as a string */\n#define PY_VERSION  "3.11.14"\n'
    )
    [python] = write_sbom.interpreters(tmp_path)
    assert (python["name"], python["version"]) == ("python", "3.11.14")
    assert ":python:3.11.14:" in python["cpe"], "by which scanners know it"
