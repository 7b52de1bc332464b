"""The bundled store's command, as the chart renders it, starts a real server that services and probes get on with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from alora_serve.errors import StoreUnavailableError
from alora_serve.kv.redis import RedisStore
from alora_serve.kv.redis_url import TlsFiles
from alora_serve.kv.store import Put, StoreKey
from redis_servers import free_port, require_redis_server, until

PASSWORD = "0123456789abcdef"
KEY = StoreKey(b"k" * 32)


def _container(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (store,) = [m for m in manifests if m["kind"] == "Deployment" and m["metadata"]["name"].endswith("-store")]
    container: dict[str, Any] = store["spec"]["template"]["spec"]["containers"][0]
    return container


def _here(command: list[str], folder: Path, port: int) -> list[str]:
    """The command for this machine: its program, its files, a free port."""
    places = {
        "valkey-server": require_redis_server(),
        "valkey-cli": "redis-cli",
        "$(REDISCLI_AUTH)": PASSWORD,
        "6379": str(port),
        "/data": str(folder),
    }
    return [places.get(word, word.replace("/etc/valkey/tls", str(folder))) for word in command]


@contextmanager
def _running(container: dict[str, Any], folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Its port and its probe's command."""
    port = free_port()
    command = _here(container["command"], folder, port)
    if "--tls-port" not in command:
        command += ["--port", str(port)]
    program, *ping = _here(container["livenessProbe"]["exec"]["command"], folder, port)
    probe = [program, "-p", str(port), *ping]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is None and _answers(probe), "an answer to the probe")
        yield port, probe
    finally:
        process.terminate()
        process.wait(10)


def _answers(probe: list[str]) -> bool:
    result = subprocess.run(
        probe, env={"REDISCLI_AUTH": PASSWORD, "PATH": "/usr/bin:/bin"}, capture_output=True, check=False
    )
    return result.returncode == 0 and b"PONG" in result.stdout


def _round_trip(url: str, tls: TlsFiles | None = None) -> bytes:
    store, found = RedisStore(url, ttl_seconds=60, tls=tls), dict[int, bytes]()
    try:
        store.put_many([Put(KEY, b"value")], timeout_seconds=10)
        store.get_many([KEY], lambda index, value: found.update({index: bytes(value)}), timeout_seconds=10)
    finally:
        store.close()
    return found[0]


@pytest.mark.parametrize(
    ("maxmemory", "limit", "fits"),
    [
        ("10gb", "3Gi", False),
        ("4gb", "5Gi", True),
        ("4097mb", "5Gi", False),
        ("1200mb", "1.5Gi", True),
        ("1300mb", "1.5Gi", False),
        ("2gb", "2500M", False),
        ("2gb", "2700M", True),
        ("2gb", 2684354560, True),
    ],
)
def test_what_the_store_may_fill_fits_its_memory_limit(
    maxmemory: str, limit: str | int, fits: bool, render: Any
) -> None:
    """Else the kernel ends it once it is full, and all KV is gone."""
    valkey = {"maxmemory": maxmemory, "resources": {"limits": {"memory": limit}}}
    arguments = ("minimal", "--set-json", f"store.valkey={json.dumps(valkey)}")
    if fits:
        assert maxmemory in _container(render(*arguments))["command"]
        return
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render(*arguments)
    assert f"store.valkey.maxmemory, {maxmemory}, must be at most four fifths" in refused.value.stderr


def test_the_store_starts_and_keeps_values(render: Any, tmp_path: Path) -> None:
    with _running(_container(render("minimal")), tmp_path) as (port, _):
        assert _round_trip(f"redis://127.0.0.1:{port}/0") == b"value"
    assert list(tmp_path.iterdir()) == []  # nothing is saved


def test_with_mutual_tls_and_a_password_it_takes_services_alone(render: Any, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "r-alora-serve-store")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    ours = TlsFiles(str(tmp_path / "ca.crt"), str(tmp_path / "tls.crt"), str(tmp_path / "tls.key"))
    with _running(_container(render("tls-cert-manager")), tmp_path) as (port, probe):
        assert _round_trip(f"rediss://:{PASSWORD}@localhost:{port}/0", ours) == b"value"
        with pytest.raises(StoreUnavailableError):
            _round_trip(f"rediss://:{PASSWORD}@localhost:{port}/0", TlsFiles(ours.ca_file))
        with pytest.raises(StoreUnavailableError):
            _round_trip(f"redis://:{PASSWORD}@localhost:{port}/0")
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.crt")
        assert not _answers(probe)  # what is not to be trusted any more, such as an expired certificate, is found
