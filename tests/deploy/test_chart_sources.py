"""Where the chart's pods have models and adapters from: claims, the hub, S3; the hub's command is run against a hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c" * 40
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


def test_the_hub_is_asked_by_its_own_command(render: Any) -> None:
    model, adapters = (
        _init_container(render, name, "--set", "model.hub.endpoint=https://hub.internal") for name in OF_HUB
    )
    includes = [f"--include=*.{ending}" for ending in ("json", "safetensors", "model", "txt", "jinja")]
    assert model["command"] == [
        *("hf", "download", "ibm-granite/granite-3.3-2b-instruct", "--revision=main"),
        *(f"--local-dir={CACHE}/models/granite-3.3-2b-instruct", *includes),
    ]
    alike = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HOME": "/tmp/huggingface"}
    assert _told(model) == alike | {"HF_ENDPOINT": "https://hub.internal", "HF_TOKEN": ("hub-token", "token")}
    assert adapters["command"] == [
        *("hf", "download", "example/certainty", "--revision=main", f"--local-dir={CACHE}/adapters/hub/certainty"),
        *(f"--include=*.{ending}" for ending in ("json", "safetensors", "yaml")),
    ]
    assert _told(adapters) == alike


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download asks for: a commit, its files, and each of them."""

    asked_with: set[str | None]
    """Tokens."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = self._content(self.path.partition("?")[0])
        if body is None:
            self.send_error(404)
            return
        self.asked_with.add(self.headers.get("Authorization"))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _content(self, path: str) -> bytes | None:
        if path.endswith("/revision/main"):
            return json.dumps({"id": "a/b", "sha": COMMIT, "siblings": []}).encode()
        if path.endswith(f"/tree/{COMMIT}"):
            files = {name: {"size": len(text), "oid": hashlib.sha1(text).hexdigest()} for name, text in FILES.items()}
            return json.dumps([{"type": "file", "path": name, **told} for name, told in files.items()]).encode()
        return FILES.get(path.rpartition(f"/resolve/{COMMIT}/")[2])

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    _Hub.asked_with = set()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "value", "endings"),
    [
        (OF_HUB[0], "model.hub.endpoint", ("json", "safetensors", "model", "jinja")),
        (OF_HUB[1], "adapters[0].hub.endpoint", ("json", "safetensors", "yaml")),
    ],
)
def test_what_services_read_comes_from_the_hub(
    name: str, value: str, endings: tuple[str, ...], render: Any, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    container = _init_container(render, name, "--set", f"{value}=http://127.0.0.1:{hub.server_port}")
    command = [word.replace(CACHE, str(tmp_path / "cache")) for word in container["command"]]
    variables = {key: told if isinstance(told, str) else TOKEN for key, told in _told(container).items()}
    variables["HF_HOME"] = str(tmp_path / "home")
    program = Path(sys.executable).with_name(command[0])
    environment = {key: told for key, told in os.environ.items() if not key.startswith("HF_")} | variables
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [folder] = [Path(word.partition("=")[2]) for word in command if word.startswith("--local-dir=")]
    fetched = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert fetched == {file: content for file, content in FILES.items() if file.rpartition(".")[2] in endings}
    assert _Hub.asked_with == {f"Bearer {TOKEN}" if name == OF_HUB[0] else None}


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
