"""What an install contains: our packages, typed stubs by sdist, wheel and editable alike, no torch in the router."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PACKAGES = {"alora_serve", "base_prefill", "adapter_decode", "adapter_router", "openai_front"}
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
SOURCES = ("pyproject.toml", "hatch_build.py", ".gitignore", "LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "proto")


def build(project: Path, target: str, output: Path) -> Path:
    """Build one artefact of ``project`` with the tools of this environment, offline."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=120)
    (artefact,) = output.iterdir()
    return artefact


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked sources alone, as in a fresh clone: no stubs, no caches."""
    root, copy = pytestconfig.rootpath, tmp_path_factory.mktemp("checkout")
    without_generated = shutil.ignore_patterns("v1", "__pycache__", ".stubs-*")
    for source in SOURCES:
        if (root / source).is_dir():
            shutil.copytree(root / source, copy / source)
        else:
            shutil.copy(root / source, copy / source)
    shutil.copytree(root / "shared", copy / "shared", ignore=without_generated)
    shutil.copytree(root / "services", copy / "services", ignore=without_generated)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_our_packages_and_nothing_called_shared_or_services(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names_in(wheel)} == PACKAGES


def test_a_wheel_carries_typed_stubs_of_every_proto_though_git_ignores_them(wheel: Path, checkout: Path) -> None:
    protos = [path.stem for path in (checkout / "proto" / "alora_serve" / "v1").glob("*.proto")]
    stubs = {f"alora_serve/v1/{proto}{suffix}" for proto in protos for suffix in STUB_SUFFIXES}
    markers = {f"{package}/py.typed" for package in PACKAGES | {"alora_serve/v1"}}
    assert stubs
    assert stubs | markers <= names_in(wheel)


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    sdist = build(checkout, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (project,) = (tmp_path / "unpacked").iterdir()
    assert (project / "shared" / "alora_serve" / "v1" / "alora_pb2.pyi").exists()
    assert names_in(build(project, "wheel", tmp_path / "wheel")) == names_in(wheel)


def test_an_installed_wheel_imports_by_our_names(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:  # what an installer does with a wheel of pure Python
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import alora_serve.v1.alora_pb2_grpc, base_prefill, adapter_decode, adapter_router, openai_front\n"
        "print(alora_serve.v1.alora_pb2_grpc.__file__, *(m.__path__[0] for m in "
        "(base_prefill, adapter_decode, adapter_router, openai_front)), sep='\\n')"
    )
    output = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    places = output.stdout.splitlines()
    assert len(places) == 5
    assert all(Path(place).is_relative_to(tmp_path) for place in places)


def test_an_editable_install_adds_the_two_source_roots_and_not_the_repository(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(checkout, "wheel:editable", tmp_path)) as archive:
        (pth,) = (name for name in archive.namelist() if name.endswith(".pth"))
        roots = archive.read(pth).decode().split()
    assert {Path(root) for root in roots} == {checkout / "shared", checkout / "services"}


def test_stubs_of_a_removed_proto_go_and_unchanged_ones_stay_untouched(checkout: Path) -> None:
    stubs = checkout / "shared" / "alora_serve" / "v1"
    generate = [sys.executable, "hatch_build.py"]
    subprocess.run(generate, cwd=checkout, check=True, capture_output=True)
    (stubs / "removed_pb2.py").touch()
    (stubs / "types_pb2.py").write_text("half a mod")
    before = (stubs / "alora_pb2.py").stat()
    subprocess.run(generate, cwd=checkout, check=True, capture_output=True)
    assert not (stubs / "removed_pb2.py").exists()
    assert "DESCRIPTOR" in (stubs / "types_pb2.py").read_text()
    after = (stubs / "alora_pb2.py").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


OWN_PROCESSES = ("__main__", ".model_check", ".peft_check")
"""Modules that are only ever run with ``python -m``; the last two exist so that the command line needs no torch."""


@pytest.mark.parametrize(
    "package", ["adapter_router", "openai_front", "alora_serve.rpc", "alora_serve.client", "alora_serve.cli"]
)
def test_router_front_door_rpc_client_and_command_line_import_without_the_model_extra(package: str) -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        "for name in ('torch', 'transformers', 'peft', 'safetensors', 'numpy', 'gguf'): sys.modules[name] = None\n"
        f"package = importlib.import_module({package!r})\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        f"    module.name.endswith({OWN_PROCESSES!r}) or importlib.import_module(module.name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["shared", "services", "proto", "pickle"])
def test_ruff_bans_importing_source_roots_and_pickle(name: str, pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "shared/alora_serve/x.py", "-"]
    result = subprocess.run(
        command,
        input=f'"""X."""\n\nimport {name}\n',
        cwd=pytestconfig.rootpath,
        check=False,
        capture_output=True,
        text=True,
    )
    assert "TID251" in result.stdout
