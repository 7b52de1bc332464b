"""A server's health as an exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from typer.testing import CliRunner

from alora_serve.cli.app import app
from alora_serve.cli.probe import main


@pytest.fixture
def servicer() -> Any:
    """Serves one thing and not another."""
    servicer = health.HealthServicer()
    servicer.set("this", health_pb2.HealthCheckResponse.SERVING)
    servicer.set("that", health_pb2.HealthCheckResponse.NOT_SERVING)
    return servicer


@pytest.fixture
def address(servicer: Any) -> Iterator[str]:
    """A server of that health."""
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(("service", "status", "exit_code"), [("this", "SERVING", 0), ("that", "NOT_SERVING", 1)])
def test_the_exit_status_says_whether_it_serves(address: str, service: str, status: str, exit_code: int) -> None:
    told = CliRunner().invoke(app, ["probe", address, "--service", service, "--json"])
    assert told.exit_code == exit_code
    assert json.loads(told.stdout) == {"address": address, "service": service, "status": status}


def test_a_health_check_says_the_same_and_loads_nothing_that_it_does_not_need(address: str, servicer: Any) -> None:
    """It runs every few seconds in every container."""
    command = [sys.executable, "-X", "importtime", "-m", "alora_serve.cli.probe"]
    asked = subprocess.run([*command, address], capture_output=True, text=True, check=False, timeout=60)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in asked.stderr.splitlines()}
    assert (asked.returncode, asked.stdout) == (0, "SERVING\n")
    assert "grpc" in loaded
    assert not loaded & {"pydantic", "pydantic_settings", "structlog", "typer", "yaml", "cryptography", "torch"}
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert main(address) == 1
    assert main("127.0.0.1:1") == 1


def test_what_is_not_there_is_said_so(address: str) -> None:
    for asked in (["probe", address, "--service", "nobody"], ["probe", "127.0.0.1:1", "--timeout", "1"]):
        told = CliRunner().invoke(app, asked)
        assert told.exit_code == 1
        assert asked[1] in told.stderr
