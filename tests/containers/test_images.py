"""The images are what the Dockerfile promises: small, without root, tools or caches, and of this very checkout."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from podman import Container, podman

ROOT = Path(__file__).resolve().parents[2]
TORCH_FREE = ("adapter-router", "openai-front")
MODEL_SERVICES = ("base-prefill", "adapter-decode")
SERVICES = (*TORCH_FREE, *MODEL_SERVICES)
CACHE = "/var/cache/alora-serve"
TORCH_FREE_BYTES = 200_000_000
UNWANTED = ("cc", "c++", "gcc", "ld", "strip", "make", "pip", "pip3", "uv", "git", "curl", "wget")
CACHES = (
    "/root/.cache",
    "/var/lib/apt/lists/*_Packages*",
    "/tmp/*",
    "/var/cache/apt/*.bin",
    "/var/cache/apt/archives/*.deb",
)

SBOMS, TOOLS = ROOT / "build" / "sbom", ROOT / "build" / "tools" / "images" / "bin"

VALIDATE = """
import pathlib, sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
print(JsonStrictValidator(SchemaVersion.V1_6).validate_str(pathlib.Path(sys.argv[1]).read_text()))
"""
DIGESTS = """
import hashlib, importlib.util, json, pathlib
names = ("alora_serve", "base_prefill", "adapter_decode", "adapter_router", "openai_front")
roots = {name: pathlib.Path(importlib.util.find_spec(name).origin).parent for name in names}
print(json.dumps({
    f"{name}/{file.relative_to(root)}": hashlib.sha256(file.read_bytes()).hexdigest()
    for name, root in roots.items() for file in root.rglob("*")
    if file.is_file() and not {"v1", "__pycache__"} & set(file.relative_to(root).parts)
}))
"""


def image(name: str) -> str:
    return f"docker.io/alora-serve/{name}:local"


def inspected(name: str) -> dict[str, Any]:
    [found] = json.loads(podman("image", "inspect", image(name)).stdout)
    return dict(found)


@pytest.fixture(scope="module")
def open_containers() -> Iterator[dict[str, Container]]:
    """One of each image, without a network, in which nothing runs."""
    waiting = ("run", "--detach", "--network=none", "--no-healthcheck", "--entrypoint=sleep")
    names = [*SERVICES, "demo-model"]
    containers = {name: Container(podman(*waiting, image(name), "infinity").stdout.strip()) for name in names}
    yield containers
    podman("rm", "--force", "--time", "0", *(container.name for container in containers.values()))


@pytest.fixture
def inside(open_containers: dict[str, Container]) -> Callable[..., str]:
    """What a command prints in a container of this image."""
    return lambda name, *command: open_containers[name].run(*command)


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", TORCH_FREE)
def test_an_image_without_torch_is_small(name: str, inside: Callable[..., str]) -> None:
    assert inspected(name)["Size"] < TORCH_FREE_BYTES
    assert inside(name, "find", "/venv", "/usr", "-name", "torch*", "-o", "-name", "transformers*") == ""


def test_a_service_runs_as_nobody_in_particular(service: str, inside: Callable[..., str]) -> None:
    assert inspected(service)["Config"]["User"] == "10001:10001"
    assert inside(service, "id", "-u").strip() == "10001"


def test_a_service_tells_its_health(service: str) -> None:
    asked = ["CMD", "python", "-m", "alora_serve.cli.probe", "127.0.0.1:50052"]
    assert inspected(service)["Healthcheck"]["Test"] == asked


def test_a_service_has_no_build_tools_and_no_caches(service: str, inside: Callable[..., str]) -> None:
    found = inside(service, "sh", "-c", f"command -v {' '.join(UNWANTED)}; ls -d {' '.join(CACHES)} 2>/dev/null; true")
    assert found == ""


def test_a_service_can_write_to_none_of_its_files(service: str, inside: Callable[..., str]) -> None:
    assert inside(service, "find", "/venv", "/usr", "/opt", "-writable", "-not", "-type", "l") == ""


@pytest.mark.parametrize("name", MODEL_SERVICES)
def test_the_volume_of_a_model_services_cache_belongs_to_its_user(name: str, inside: Callable[..., str]) -> None:
    """A volume that nobody prepared: it has the owner of the folder that the image holds there."""
    assert set(inspected(name)["Config"]["Volumes"]) == {CACHE}
    assert inside(name, "stat", "--format=%u:%g %a", CACHE) == "10001:10001 755\n"
    assert inside(name, "sh", "-c", f"touch {CACHE}/written && ls {CACHE}") == "written\n"


def test_a_service_is_this_checkout(service: str, inside: Callable[..., str]) -> None:
    """A cached layer would be something older."""
    installed = json.loads(inside(service, "python", "-c", DIGESTS))
    sources = {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for root in (ROOT / "shared", ROOT / "services")
        for file in root.rglob("*")
        if file.is_file() and not {"v1", "__pycache__"} & set(file.parts)
    }
    assert installed == sources


def test_the_demo_model_image_holds_model_and_adapters(inside: Callable[..., str]) -> None:
    held = set(inside("demo-model", "ls", "/files/model", "/files/adapters").split())
    assert {"config.json", "model.safetensors", "tokenizer.json", "jailbreak", "jailbreak-lora"} <= held


def test_bills_of_materials_are_valid_and_list_debian_too() -> None:
    command = [TOOLS / "python", "-c", VALIDATE, SBOMS / "adapter-router.cdx.json"]  # one: validating takes its time
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "None\n")
    for name in (*SERVICES, "demo-model"):
        assert any(component.get("purl", "").startswith("pkg:deb/debian/libc6@") for component in components(name))


@pytest.mark.parametrize(
    ("name", "lock"),
    [
        ("adapter-router", "requirements-router"),
        ("openai-front", "requirements-http"),
        ("adapter-decode", "requirements"),
    ],
)
def test_an_image_holds_what_is_locked_and_torch(name: str, lock: str) -> None:
    pins = re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", (ROOT / f"{lock}.lock").read_text(), re.MULTILINE)
    locked = {f"pkg:pypi/{package}@{version}" for package, version in pins}
    held = {component.get("purl", "") for component in components(name)}
    python = {purl for purl in held if purl.startswith("pkg:pypi/")}
    assert len(python) > 30
    assert {purl.partition("@")[0] for purl in python - locked} <= {"pkg:pypi/torch"}


def components(name: str) -> list[dict[str, Any]]:
    return list(json.loads((SBOMS / f"{name}.cdx.json").read_text())["components"])
