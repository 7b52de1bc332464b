"""The standard variables say whether traces are made and where they go; without them the SDK is not even loaded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from trace_collector import Collector, collector

TIMEOUT_SECONDS = 60.0

PROGRAM = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(f"{module}.__main__")
from alora_serve.logging import configure_logging
from alora_serve.telemetry import current, span, tracer, tracing

configure_logging("probe", level="info", log_format="json")
with tracing("probe"):
    if tracer() is not None:
        with current(tracer().start_span("root")) as root, span("inner"):
            pass
        root.end()
    print("on" if tracer() is not None else "off", "opentelemetry.sdk" in sys.modules)
"""


def run(*services: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", PROGRAM, *services]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)


@pytest.fixture
def collecting() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SERVICE_NAME": "mine", "OTEL_TRACES_SAMPLER": "always_on"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=["nothing set", "empty", "no endpoint", "disabled", "no exporter"],
)
def test_without_a_collector_traces_are_off(variables: dict[str, str]) -> None:
    assert run("adapter_router", **variables).stdout.split() == ["off", "False"]


def test_off_none_of_the_services_loads_the_sdk() -> None:
    assert run("adapter_router", "base_prefill", "adapter_decode").stdout.split() == ["off", "False"]


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_either_endpoint_turns_traces_on_and_the_last_spans_leave_at_the_end(
    collecting: Collector, variable: str
) -> None:
    # Longer than the program runs: what arrives was sent at its end.
    ran = run(**{variable: f"http://{collecting.address}", "OTEL_BSP_SCHEDULE_DELAY": "60000"})
    assert ran.stdout.split() == ["on", "True"]
    assert ran.stderr == ""
    [inner, root] = sorted(collecting.spans(), key=lambda span: span.name)
    assert (root.name, inner.name, inner.parent_id) == ("root", "inner", root.span_id)
    assert root.service == "probe"
    assert root.instance, "replicas are told apart"


def test_the_environment_names_the_service_and_samples(collecting: Collector) -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collecting.address}"}
    run(**endpoint, OTEL_RESOURCE_ATTRIBUTES="service.name=theirs,service.instance.id=pod-7")
    run(**endpoint, OTEL_SERVICE_NAME="ours")
    run(**endpoint, OTEL_TRACES_SAMPLER="always_off")
    named = {(span.service, span.instance) for span in collecting.spans() if span.name == "root"}
    assert ("theirs", "pod-7") in named
    assert {service for service, _ in named} == {"theirs", "ours"}
    assert len(collecting.spans()) == 4, "nothing of the third, which is not sampled"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier-pigeon"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
    ],
)
def test_a_value_that_is_not_served_is_told_by_name_and_costs_traces_alone(variable: str, value: str) -> None:
    told = problem(**{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", variable: value})
    assert value in told or variable.lower().removeprefix("otel_bsp_") in told


def test_a_protocol_whose_package_is_missing_is_told_with_what_to_do() -> None:
    """The protocol is the specification's default, and is often set for all pods of a cluster."""
    told = problem(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
    assert "opentelemetry-exporter-otlp-proto-http" in told
    assert "set it to grpc" in told


def problem(**variables: str) -> str:
    """What is logged where the block runs without traces."""
    ran = run(**variables)
    assert ran.stdout.split()[0] == "off"
    [line] = [json.loads(line) for line in ran.stderr.splitlines() if '"no traces"' in line]
    assert line["level"] == "error"
    return str(line["problem"])


def test_a_collector_that_never_answers_does_not_hold_up_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        ran = run(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert ran.stdout.split() == ["on", "True"]
    assert "last spans not sent" in ran.stderr
