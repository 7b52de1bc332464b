"""A server's health as an exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from typer.testing import CliRunner

from alora_serve.cli.app import app


@pytest.fixture
def address() -> Iterator[str]:
    """A server that is alive, serves one thing and not another."""
    servicer = health.HealthServicer()
    servicer.set("this", health_pb2.HealthCheckResponse.SERVING)
    servicer.set("that", health_pb2.HealthCheckResponse.NOT_SERVING)
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


def test_what_is_not_there_is_said_so(address: str) -> None:
    for asked in (["probe", address, "--service", "nobody"], ["probe", "127.0.0.1:1", "--timeout", "1"]):
        told = CliRunner().invoke(app, asked)
        assert told.exit_code == 1
        assert asked[1] in told.stderr
