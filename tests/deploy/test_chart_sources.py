"""Where the chart's pods have models and adapters from: claims, the hub, S3; the hub's copies come from a hub."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_hub import FakeHub, fake_hub, fetched

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"tokens",
    "chat_template.jinja": b"{{ messages }}",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"more weights",
    "io.yaml": b"model: ~",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"a card",
}
CACHE = "/var/cache/alora-serve"
OF_HUB = ("models-granite-3-3-2b-instruct", "adapters-hub")
TOKEN = "a token of the hub"


def _init_container(render: Any, name: str, *arguments: str) -> dict[str, Any]:
    manifests = render("statefulset", *arguments)
    [workers] = [
        m for m in manifests if m["kind"] == "StatefulSet" and m["metadata"]["name"].endswith("adapter-decode")
    ]
    [found] = [one for one in workers["spec"]["template"]["spec"]["initContainers"] if one["name"] == name]
    return dict(found)


def _told(container: dict[str, Any]) -> dict[str, Any]:
    """Values of variables; of those from secrets, the secret's name and key."""
    return {
        entry["name"]: entry["value"] if "value" in entry else tuple(entry["valueFrom"]["secretKeyRef"].values())
        for entry in container["env"]
    }


@pytest.mark.parametrize("component", ["base-prefill", "adapter-decode"])
def test_a_claim_is_mounted_read_only(component: str, render: Any) -> None:
    [workload] = [m for m in render("gpu") if m["metadata"]["name"].endswith(component) and m["kind"] == "Deployment"]
    pod = workload["spec"]["template"]["spec"]
    claims = {one["name"]: one["persistentVolumeClaim"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
    mounts = {one["name"]: one for one in pod["containers"][0]["volumeMounts"]}
    assert len(claims) == (2 if component == "adapter-decode" else 1)
    for name, claim in claims.items():
        assert claim["readOnly"] is True
        assert mounts[name]["readOnly"] is True
    assert mounts["models-granite-3-3-8b-instruct"]["subPath"] == "granite-3.3-8b-instruct"


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_what_values_name(render: Any) -> None:
    model, adapters = (
        _init_container(render, name, "--set", "model.hub.endpoint=https://hub.internal") for name in OF_HUB
    )
    includes = [f"--include=*.{ending}" for ending in ("json", "safetensors", "model", "txt", "jinja")]
    assert model["command"] == [
        *("python", "-m", "alora_serve.model.hub_copy", "ibm-granite/granite-3.3-2b-instruct", "--revision=main"),
        *(f"--root={CACHE}/models/granite-3.3-2b-instruct", *includes),
    ]
    alike = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HOME": "/tmp/huggingface"}
    assert _told(model) == alike | {"HF_ENDPOINT": "https://hub.internal", "HF_TOKEN": ("hub-token", "token")}
    assert adapters["command"] == [
        *("python", "-m", "alora_serve.model.hub_copy", "example/certainty", "--revision=main"),
        *(f"--root={CACHE}/adapters/hub", "--folder=certainty"),
        *(f"--include=*.{ending}" for ending in ("json", "safetensors", "yaml")),
    ]
    assert _told(adapters) == alike


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub(main=FILES) as hub:
        yield hub


@pytest.mark.parametrize(
    ("name", "value", "endings"),
    [
        (OF_HUB[0], "model.hub.endpoint", ("json", "safetensors", "model", "jinja")),
        (OF_HUB[1], "adapters[0].hub.endpoint", ("json", "safetensors", "yaml")),
    ],
)
def test_what_services_read_comes_from_the_hub(
    name: str, value: str, endings: tuple[str, ...], render: Any, hub: FakeHub, tmp_path: Path
) -> None:
    container = _init_container(render, name, "--set", f"{value}={hub.endpoint}")
    command = [word.replace(CACHE, str(tmp_path / "cache")) for word in container["command"]]
    variables = {key: told if isinstance(told, str) else TOKEN for key, told in _told(container).items()}
    environment = hub.environment(tmp_path) | variables | {"HF_HOME": str(tmp_path / "home")}
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = {OF_HUB[0]: "models/granite-3.3-2b-instruct", OF_HUB[1]: "adapters/hub/certainty"}[name]
    wanted = {file: content for file, content in FILES.items() if file.rpartition(".")[2] in endings}
    assert fetched(tmp_path / "cache" / folder) == wanted
    assert hub.asked_with == {f"Bearer {TOKEN}" if name == OF_HUB[0] else None}


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_s3_is_asked_by_rclone_which_variables_tell_all(render: Any) -> None:
    container = _init_container(render, "adapters-team")
    assert container["image"].startswith("docker.io/rclone/rclone:")
    assert "command" not in container
    assert container["args"] == ["sync", ":s3:models/adapters", f"{CACHE}/adapters/team", "--config="]
    assert _told(container) == {
        "RCLONE_S3_PROVIDER": "Minio",
        "RCLONE_S3_REGION": "us-east-1",
        "RCLONE_S3_ENDPOINT": "http://minio.storage:9000",
        "RCLONE_S3_ACCESS_KEY_ID": ("minio", "access-key-id"),
        "RCLONE_S3_SECRET_ACCESS_KEY": ("minio", "secret-access-key"),
    }


def test_s3_without_a_secret_is_asked_as_the_service_account_may(render: Any) -> None:
    source = (
        "adapters[1].s3.credentialsSecret=,adapters[1].s3.endpoint=,adapters[1].s3.prefix=,adapters[1].s3.provider=AWS"
    )
    container = _init_container(render, "adapters-team", "--set", source)
    assert container["args"][1] == ":s3:models"
    assert _told(container) == {
        "RCLONE_S3_PROVIDER": "AWS",
        "RCLONE_S3_REGION": "us-east-1",
        "RCLONE_S3_ENV_AUTH": "true",
    }
