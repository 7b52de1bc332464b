"""The rendered chart, and the tools it is checked with (``scripts/fetch_tools.py``), without which tests skip."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "alora-serve"
TOOLS = Path(os.environ.get("ALORA_TEST_TOOLS", ROOT / "build" / "tools"))
VALUES_FILES = sorted((CHART / "ci").glob("*-values.yaml"))
OLDEST, NEWEST = "1.28", "1.37"

Manifest = dict[str, Any]


class Render(Protocol):
    """Renders the chart with Helm 4; raises CalledProcessError, whose ``stderr`` says why, when Helm refuses."""

    def __call__(
        self, values: str, *arguments: str, kubernetes: str = NEWEST, helm: str = "helm4"
    ) -> list[Manifest]: ...


def tool(name: str) -> Path:
    """Where a fetched tool is; skips the test when it is not there."""
    path = TOOLS / name
    if not path.exists():
        pytest.skip(f"no {path}: python scripts/fetch_tools.py {name}")
    return path


@functools.cache
def run_helm(helm: Path, *arguments: str) -> str:
    return subprocess.run([helm, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


@functools.cache
def parse(text: str) -> list[Manifest]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    return [manifest for manifest in yaml.load_all(text, loader) if manifest]


@pytest.fixture
def render() -> Render:
    def rendered(values: str, *arguments: str, kubernetes: str = NEWEST, helm: str = "helm4") -> list[Manifest]:
        file = CHART / "ci" / f"{values}-values.yaml"
        command = ("template", "r", str(CHART), "--namespace", "serving", "--kube-version", f"{kubernetes}.0")
        return parse(run_helm(tool(helm), *command, "--values", str(file), *arguments))

    return rendered


@pytest.fixture
def tools() -> Callable[[str], Path]:
    return tool


@pytest.fixture
def versions() -> Callable[[str], tuple[str, str]]:
    """The oldest and the newest Kubernetes that a values file is for; its first line says so where not all are."""

    def of(values: str) -> tuple[str, str]:
        first = (CHART / "ci" / f"{values}-values.yaml").read_text().partition("\n")[0]
        return (first.removeprefix("# kubernetes: ") if first.startswith("# kubernetes: ") else OLDEST), NEWEST

    return of


@pytest.fixture
def chart_helm() -> Callable[..., str]:
    """Runs one of the Helms; what it prints."""
    return lambda helm, *arguments: run_helm(tool(helm), *arguments)


@pytest.fixture(params=[file.name.removesuffix("-values.yaml") for file in VALUES_FILES])
def values(request: pytest.FixtureRequest) -> str:
    """Each file of the chart's matrix."""
    return str(request.param)


@pytest.fixture
def every_values() -> list[str]:
    """The whole matrix, for what is slow to start and quick to do."""
    return [file.name.removesuffix("-values.yaml") for file in VALUES_FILES]


@pytest.fixture(params=["helm3", "helm4"])
def helm(request: pytest.FixtureRequest) -> str:
    """Each supported major version of Helm."""
    return str(request.param)


@pytest.fixture
def node() -> Callable[[str, str], str]:
    """Runs a JavaScript module beside the fetched schemas on some input."""

    def run(module: str, given: str) -> str:
        if shutil.which("node") is None:
            pytest.skip("no node, which runs the operators' schemas")
        command = ["node", "--input-type=module", "--eval", module]
        result = subprocess.run(
            command, input=given, cwd=tool("schemas"), capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
