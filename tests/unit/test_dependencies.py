"""Declared, locked and imported dependencies agree: a clean install runs and carries nothing that it does not use."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Import names that several distributions share.
NAMESPACES = {
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "opentelemetry.context": "opentelemetry-api",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.trace": "opentelemetry-api",
}
# Declared though never imported by name, each for its reason.
USED_UNIMPORTED = {
    "opentelemetry-exporter-otlp-proto-grpc": "found by its entry point, where a collector is named",
    "hiredis": "redis-py parses with it when it is installed",
    "jinja2": "transformers renders chat templates with it",
    "gguf": "transformers reads the demo model's weights with it",
}


@pytest.fixture(scope="module")
def root(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath


@pytest.fixture(scope="module")
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def parse(requirements: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(parsed.name): parsed for parsed in map(Requirement, requirements)}


def read_lock(path: Path) -> dict[str, str]:
    """Version of every package in a lock file."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ ]+)", path.read_text(), flags=re.MULTILINE))


def imported_modules(file: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def distributions_imported_by(directory: Path) -> set[str]:
    """Third-party distributions that the Python files under ``directory`` import, by canonical name."""
    installed = packages_distributions()
    own = {"alora_serve", "base_prefill", "adapter_decode", "adapter_router", "openai_front"}
    found: set[str] = set()
    for file in directory.rglob("*.py"):
        if file.parent.name == "v1":  # generated, and its servicers' users import all that it does
            continue
        for module in imported_modules(file):
            top = module.split(".")[0]
            if top in own or top in sys.stdlib_module_names:
                continue
            shared = [name for prefix, name in NAMESPACES.items() if module.startswith(prefix)]
            owners = shared or installed.get(top, [f"unknown: {module}"])
            assert len(set(owners)) == 1, f"{module} in {file.name}: say in NAMESPACES which of {owners} it is"
            found.add(canonicalize_name(owners[0]))
    return found


def test_what_the_code_imports_is_declared_and_what_is_declared_is_used(root: Path, pyproject: dict[str, Any]) -> None:
    declared = {
        *parse(pyproject["project"]["dependencies"]),
        *parse(pyproject["project"]["optional-dependencies"]["model"]),
        *parse(pyproject["project"]["optional-dependencies"]["http"]),
    }
    imported = distributions_imported_by(root / "shared") | distributions_imported_by(root / "services")
    assert imported - declared == set(), "imported but not declared in pyproject.toml"
    assert declared - imported - set(USED_UNIMPORTED) == set(), "declared but never imported"


@pytest.mark.parametrize("place", ["services/adapter_router", "shared/alora_serve/rpc", "shared/alora_serve/client"])
def test_torch_free_parts_import_core_dependencies_only(root: Path, pyproject: dict[str, Any], place: str) -> None:
    assert distributions_imported_by(root / place) <= set(parse(pyproject["project"]["dependencies"]))


def test_the_front_door_imports_its_extra_and_core_dependencies_only(root: Path, pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    declared = parse(project["dependencies"] + project["optional-dependencies"]["http"])
    assert distributions_imported_by(root / "services" / "openai_front") <= set(declared)


def test_locks_are_fresh_hold_hashes_and_name_no_index(root: Path, pyproject: dict[str, Any]) -> None:
    groups = pyproject["dependency-groups"]
    extras = pyproject["project"]["optional-dependencies"]
    needed = pyproject["project"]["dependencies"] + extras["model"] + extras["http"]
    needed += groups["build"] + groups["torch"]
    for name, requirements in {"requirements.lock": needed, "requirements-dev.lock": needed + groups["dev"]}.items():
        text, versions = (root / name).read_text(), read_lock(root / name)
        for package, requirement in parse(requirements).items():
            if package != "torch":
                assert requirement.specifier.contains(versions[package]), f"{package} in {name}: run make lock"
        assert "://" not in text
        assert "torch" not in versions
        blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
        assert len(blocks) >= len(versions)
        assert [block.split("==")[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_the_locks_hold_what_torch_needs_but_its_libraries_for_gpus(root: Path) -> None:
    """Else it would come without a hash, behind torch."""
    versions = read_lock(root / "requirements.lock")
    with_torch = re.compile("cuda-|nvidia-|triton|pytorch-triton")
    needed = {
        name: requirement
        for name, requirement in parse(requires("torch") or []).items()
        if not with_torch.match(name) and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    }
    assert {"sympy", "networkx", "filelock"} <= set(needed)
    assert {name for name, asked in needed.items() if not asked.specifier.contains(versions[name])} == set()


def test_the_development_lock_extends_the_running_one(root: Path) -> None:
    running, development = read_lock(root / "requirements.lock"), read_lock(root / "requirements-dev.lock")
    assert running.items() <= development.items()


def test_the_locks_of_images_pin_as_the_running_one(root: Path, pyproject: dict[str, Any]) -> None:
    running, router, http = (
        read_lock(root / name) for name in ("requirements.lock", "requirements-router.lock", "requirements-http.lock")
    )
    assert router.items() <= http.items() <= running.items()
    assert set(parse(pyproject["project"]["optional-dependencies"]["http"])) <= set(http)


def test_the_build_group_is_what_an_isolated_build_requires(pyproject: dict[str, Any]) -> None:
    assert pyproject["dependency-groups"]["build"] == pyproject["build-system"]["requires"]


def test_the_torch_that_make_installs_satisfies_the_declared_range(root: Path, pyproject: dict[str, Any]) -> None:
    pinned = re.search(r"^TORCH := torch==(\S+)$", (root / "Makefile").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    declared = parse(pyproject["project"]["optional-dependencies"]["model"])["torch"]
    assert declared.specifier.contains(pinned[1])


def test_the_grpc_family_is_pinned_to_one_version(pyproject: dict[str, Any]) -> None:
    requirements = pyproject["project"]["dependencies"] + pyproject["dependency-groups"]["build"]
    versions = {str(parsed.specifier) for name, parsed in parse(requirements).items() if name.startswith("grpcio")}
    assert len(versions) == 1


def test_the_decision_record_gives_a_reason_for_each_dependency(root: Path, pyproject: dict[str, Any]) -> None:
    table = (
        (root / "docs" / "adr" / "0001-packaging-and-dependencies.md").read_text().split("## Why each dependency")[1]
    )
    explained = set(re.findall(r"[a-z0-9-]+", " ".join(re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE))))
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    assert set(parse(project["dependencies"] + extras["model"] + extras["http"])) <= explained
