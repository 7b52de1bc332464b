"""Load reports say what is going on, in the form that gRPC's own balancer and Envoy read."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.rpc.channels import server_options
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.interceptors import CallInterceptor
from alora_serve.rpc.load_reports import LOAD_REPORT_KEY, RATE_SECONDS, LoadReporter
from alora_serve.types import ServingLoad
from alora_serve.v1 import base_prefill_pb2 as pb2
from alora_serve.v1.base_prefill_pb2_grpc import (
    BasePrefillServiceServicer,
    BasePrefillServiceStub,
    add_BasePrefillServiceServicer_to_server,
)
from alora_serve.v1.load_report_pb2 import LoadReport

TIMEOUT_SECONDS = 30.0


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def read(metadata: tuple[tuple[str, bytes], ...]) -> LoadReport:
    [(key, value)] = metadata
    assert key == LOAD_REPORT_KEY
    return LoadReport.FromString(value)


def test_a_report_is_orcas_on_the_wire() -> None:
    """Numbers and types of xds.data.orca.v3.OrcaLoadReport."""
    fields = {field.name: (field.number, field.type) for field in LoadReport.DESCRIPTOR.fields}
    double, message = LoadReport.DESCRIPTOR.fields_by_name["eps"].TYPE_DOUBLE, 11
    orcas = {
        "rps_fractional": (6, double),
        "eps": (7, double),
        "named_metrics": (8, message),
        "application_utilization": (9, double),
    }
    assert fields == orcas


def test_a_report_tells_the_load_of_the_moment_and_counts_the_call_itself() -> None:
    load = ServingLoad(running=8, waiting=3, requests=15, max_running=8, queued_prefill_tokens=1200, kv_usage=0.5)
    report = read(LoadReporter(lambda: load)("OK"))
    assert report.application_utilization == 16 / 8
    assert dict(report.named_metrics) == {
        "num_requests_running": 8,
        "num_requests_waiting": 3,
        "kv_cache_usage_perc": 0.5,
        "queued_prefill_tokens": 1200,
    }


def test_the_first_report_of_an_idle_service_counts() -> None:
    """Balancers ignore those whose rate or utilization is 0."""
    report = read(LoadReporter(ServingLoad)("OK"))
    assert report.rps_fractional > 0
    assert report.application_utilization > 0
    assert report.eps == 0


def test_rates_are_those_of_late() -> None:
    clock = Clock()
    reporter = LoadReporter(ServingLoad, clock)
    for number in range(200):
        clock.now += 0.5
        report = read(reporter("UNAVAILABLE" if number % 4 == 0 else "OK"))
    assert report.rps_fractional == pytest.approx(2.0, rel=0.05)
    assert report.eps == pytest.approx(0.5, rel=0.1)
    clock.now += 5 * RATE_SECONDS
    assert read(reporter("OK")).rps_fractional < 0.2, "what was long ago"


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        ("OK", 0),
        ("INVALID_ARGUMENT", 0),
        ("NOT_FOUND", 0),
        ("RESOURCE_EXHAUSTED", 1),
        ("INTERNAL", 1),
        ("UNAVAILABLE", 1),
    ],
)
def test_failures_are_those_that_another_replica_might_spare_the_caller(code: str, failed: int) -> None:
    report = read(LoadReporter(ServingLoad)(code))
    assert report.eps == failed * report.rps_fractional


@given(
    st.builds(ServingLoad, *[st.integers(0, 3)] * 3, st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 0.5]))
)
def test_a_report_is_a_multiple_of_three_bytes_long(load: ServingLoad) -> None:
    """A further metric that breaks it needs another name, or Envoy before 1.40 ignores the reports in silence."""
    reporter = LoadReporter(lambda: load)
    for code in ("OK", "INTERNAL"):
        [(_, value)] = reporter(code)
        assert len(value) % 3 == 0


class Servicer(BasePrefillServiceServicer):
    """Counts its calls under a name."""

    def __init__(self, name: str, calls: Counter[str]) -> None:
        self.name, self.calls = name, calls

    async def Prefill(self, request: Any, context: Any) -> pb2.BasePrefillServicePrefillResponse:  # noqa: N802
        self.calls[self.name] += 1
        return pb2.BasePrefillServicePrefillResponse()


class Nobody:
    """Counts nothing."""

    def started(self, method: str) -> None: ...

    def handled(self, method: str, code: str, seconds: float) -> None: ...


@asynccontextmanager
async def served(name: str, load: ServingLoad, calls: Counter[str]) -> AsyncIterator[str]:
    interceptor = CallInterceptor(Nobody(), InFlightCalls(), load_reports=LoadReporter(lambda: load))
    server = grpc.aio.server(interceptors=[interceptor], options=server_options())
    add_BasePrefillServiceServicer_to_server(Servicer(name, calls), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_grpcs_own_weighted_round_robin_sends_less_to_the_busier_replica() -> None:
    """A client that knows nothing of us but these reports; which it keeps from its callers."""
    calls = Counter[str]()
    policy = {"weighted_round_robin": {"blackoutPeriod": "0.001s", "weightUpdatePeriod": "0.1s"}}
    options = [("grpc.service_config", json.dumps({"loadBalancingConfig": [policy]})), ("grpc.enable_http_proxy", 0)]
    async with AsyncExitStack() as stack:
        addresses = [
            await stack.enter_async_context(served(name, ServingLoad(requests=requests, max_running=8), calls))
            for name, requests in (("busy", 7), ("idle", 1))
        ]
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"ipv4:{','.join(addresses)}", options=options)
        )
        stub: Any = BasePrefillServiceStub(channel)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while True:
                calls.clear()
                for _ in range(50):
                    await stub.Prefill(pb2.BasePrefillServicePrefillRequest(), wait_for_ready=True)
                # Rates even out as it goes, so it is by the utilization that they differ: 8 of 8 places against 2.
                if calls["idle"] > 2 * calls["busy"] > 0:
                    break
                await asyncio.sleep(0.1)
