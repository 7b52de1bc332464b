"""The Dockerfile and docker-compose.yml, before anything is built: ``make containers`` builds and runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
DOCKERFILES = (DOCKERFILE, ROOT / "tests" / "containers" / "stand-ins" / "Dockerfile")
PIP_VARIABLES = {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("file", DOCKERFILES, ids=["product", "stand-ins"])
def test_hadolint_finds_nothing(file: Path, tools: Callable[[str], Path]) -> None:
    done = run(tools("images/bin/hadolint"), file)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_compose_takes_its_file(tools: Callable[[str], Path], tmp_path: Path) -> None:
    compose = tools("images/bin/docker-compose")
    done = run(compose, "config", "--quiet")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text((ROOT / "docker-compose.yml").read_text().replace("read_only:", "readonly:"))
    assert "readonly" in run(compose, "--file", wrong, "config", "--quiet").stderr


def test_compose_builds_each_image_that_is_ours(compose: dict[str, Any]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE))
    built = {
        service["build"]["target"]: service["image"] for service in compose["services"].values() if "build" in service
    }
    assert built.keys() <= targets
    assert all(image == f"alora-serve/{target}:${{ALORA_TAG:-local}}" for target, image in built.items())


def stages_below(target: str) -> set[str]:
    """A stage of the Dockerfile, and those that it is made from."""
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]
    made_from: dict[str, set[str]] = {}
    for parent, _, name, *body in map(str.split, stages):
        copied = {word.removeprefix("--from=") for word in body if word.startswith("--from=")}
        made_from[name] = {parent, *copied}
    found = {target}
    while more := {below for stage in found for below in made_from.get(stage, ())} - found:
        found |= more
    return found


def builds_of_compose(compose: Path, **environment: str) -> list[dict[str, Any]]:
    """What Compose would build with these variables, and none of pip's and torch's besides."""
    command = [compose, "--profile", "http", "config", "--format", "json"]
    ambient = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "TORCH_"))}
    done = subprocess.run(command, cwd=ROOT, env=ambient | environment, capture_output=True, check=True, timeout=60)
    return [service["build"] for service in json.loads(done.stdout)["services"].values() if "build" in service]


def test_the_environment_of_compose_chooses_the_torch_of_each_image_that_has_one(tools: Callable[[str], Path]) -> None:
    chosen = {"TORCH_PIP_ARGS": "--index-url https://example.com/cpu", "TORCH_SHA256": "0" * 64}
    builds = builds_of_compose(tools("images/bin/docker-compose"), **chosen)
    with_torch = {build["target"] for build in builds if "model-venv" in stages_below(build["target"])}
    assert with_torch == {"demo-model", "base-prefill", "adapter-decode"}
    for build in builds:
        assert build.get("args", {}) == (chosen if build["target"] in with_torch else {}), build["target"]


def test_pips_own_variables_reach_each_build_of_compose_where_they_are_set(tools: Callable[[str], Path]) -> None:
    mirror = {"PIP_INDEX_URL": "https://example.com/simple", "PIP_TRUSTED_HOST": "example.com"}
    builds = builds_of_compose(tools("images/bin/docker-compose"), **mirror)
    assert len(builds) > 4
    for build in builds:
        given = {name: value for name, value in build["args"].items() if name.startswith("PIP_")}
        assert given == mirror, build["target"]


def test_pips_own_variables_reach_each_stage_that_runs_pip_and_no_other() -> None:
    """Stages name them for themselves: buildah hands arguments to no stage that begins with theirs."""
    stages = re.findall(r"^FROM \S+ AS (\S+)$(.*?)(?=^FROM |\Z)", DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL)
    runs_pip = [name for name, body in stages if re.search(r"/pip (install|download|wheel)", body)]
    assert runs_pip == ["package", "router-venv", "http-venv", "model-venv", "demo-files"]
    for name, body in stages:
        named = {word for line in re.findall(r"^ARG (.+)$", body, re.MULTILINE) for word in line.split()}
        assert named & PIP_VARIABLES == (PIP_VARIABLES if name in runs_pip else set()), name


def test_no_service_of_compose_may_do_more_than_it_must(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name == "demo":  # copies files, without a network
            assert service["network_mode"] == "none"
            continue
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_images_keep_nothing_of_their_base_that_installs(tmp_path: Path) -> None:
    """The step itself, on an environment as the official image has it, and then on one that has nothing to remove."""
    [stage] = re.findall(
        r"^FROM \$\{PYTHON_IMAGE\} AS runtime$(.+?)^FROM runtime", DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL
    )
    [step] = re.findall(r"^RUN (.+?[^\\])$", stage, re.MULTILINE | re.DOTALL)
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    [library] = (tmp_path / "lib").glob("python3.*")
    (library / "ensurepip").mkdir()
    assert (library / "site-packages" / "pip").exists()
    for _ in range(2):
        command = step.replace("/usr/local", str(tmp_path))
        subprocess.run(["sh", "-euc", command], env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}, check=True)
        left = {path.name for path in library.rglob("*")}
        assert not left & {"pip", "setuptools", "wheel", "ensurepip"}
    assert not list((tmp_path / "bin").glob("pip*"))


def test_images_have_the_torch_that_the_project_asks_for() -> None:
    version = re.search(r"^ARG TORCH_VERSION=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    wanted = re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version is not None
    assert wanted is not None
    assert version[1] == wanted[1]


def test_all_that_the_dockerfile_copies_is_in_the_context() -> None:
    """.dockerignore leaves everything out that is not named."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {re.sub(r"^requirements.*\.lock$", "requirements*.lock", name) for name in names} == let_in
