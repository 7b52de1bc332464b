"""A served process reports its addresses, watches its health, drains on a signal, and says what is wrong at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from alora_serve.cli.probe import health_of
from alora_serve.rpc.channels import MAX_MESSAGE_BYTES, internal_channel
from alora_serve.rpc.health import LIVENESS, STARTUP
from alora_serve.v1 import base_prefill_pb2 as pb2
from alora_serve.v1.base_prefill_pb2_grpc import BasePrefillServiceStub

SERVICE = "alora_serve.v1.BasePrefillService"
TIMEOUT_SECONDS = 30.0

PROGRAM = '''
import asyncio, os, sys
from functools import partial
from alora_serve.config import ServerSettings
from alora_serve.metrics import RpcMetrics
from alora_serve.rpc.monitoring import monitored
from alora_serve.rpc.server import Service, run_service, serve
from alora_serve.v1 import base_prefill_pb2 as pb2
from alora_serve.v1.base_prefill_pb2_grpc import BasePrefillServiceServicer, add_BasePrefillServiceServicer_to_server

SERVICE = "alora_serve.v1.BasePrefillService"

class Servicer(BasePrefillServiceServicer):
    """Prefill answers when `request_id` is "quick", and otherwise when a SIGUSR1 arrives."""
    def __init__(self):
        self.go = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(10, self.go.set)
    async def Prefill(self, request, context):
        if request.request_id == "die":
            crash.set_exception(RuntimeError("the engine is gone"))
        if request.request_id != "quick":
            print("running", flush=True)
            await self.go.wait()
        return pb2.BasePrefillServicePrefillResponse()
    async def WatchStatus(self, request, context):
        yield pb2.BasePrefillServiceWatchStatusResponse()
        await asyncio.Event().wait()

async def main(settings):
    global crash
    crash = asyncio.get_running_loop().create_future()
    async def say(word):
        print(word, flush=True)
    async def fail():
        raise RuntimeError("a broken hook")
    async with monitored(settings, [SERVICE]) as monitoring:
        if "LOADING" in os.environ:
            print("loading", *map(monitoring.addresses.get, ["health_address", "metrics_address"]), flush=True)
            await asyncio.to_thread(sys.stdin.readline)
        return await serve(
            "probe", settings,
            [Service(SERVICE, partial(add_BasePrefillServiceServicer_to_server, Servicer()))],
            monitoring=monitoring, observer=RpcMetrics(monitoring.registry), max_message_bytes=lambda: 1 << 20,
            on_drain=lambda: print("drain", flush=True),
            cleanup=[fail, partial(say, "first"), partial(say, "second")],
            essential=[crash],
        )

run_service("probe", ServerSettings, main)
'''


class Process:
    """A running server and what it said about itself."""

    def __init__(self, *flags: str, **variables: str) -> None:
        command, pipe = [sys.executable, "-c", PROGRAM, *flags], subprocess.PIPE
        environment = {**os.environ, **variables}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def listening(self) -> dict[str, Any]:
        line = self.line()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        told: dict[str, Any] = json.loads(line)
        return told

    def end(self) -> tuple[int, list[str], str]:
        """Exit status, remaining lines, log."""
        out, err = self.process.communicate(timeout=TIMEOUT_SECONDS)
        return self.process.returncode, out.split(), err


@contextmanager
def running(*flags: str, **variables: str) -> Iterator[Process]:
    process = Process(*flags, **variables)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


def prefill(channel: grpc.aio.Channel, request_id: str) -> grpc.aio.UnaryUnaryCall[Any, Any]:
    stub: Any = BasePrefillServiceStub(channel)
    call: grpc.aio.UnaryUnaryCall[Any, Any] = stub.Prefill(
        pb2.BasePrefillServicePrefillRequest(request_id=request_id), timeout=TIMEOUT_SECONDS, wait_for_ready=True
    )
    return call


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_SECONDS) as answer:
        return str(answer.read().decode())


async def test_it_reports_its_addresses_and_serves_metrics_health_and_reflection() -> None:
    with running() as process:
        told = process.listening()
        assert told["event"] == "listening"
        assert told["service"] == "probe"
        async with internal_channel(told["address"]) as channel:
            await prefill(channel, "quick")
            health: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_SECONDS)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=TIMEOUT_SECONDS)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = [answer async for answer in reflection.ServerReflectionInfo(iter([asked]))]
            names = [service.name for service in answers[0].list_services_response.service]
            assert names == [
                SERVICE,
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            ]
        text = await asyncio.to_thread(scrape, told["metrics_address"])
        assert f'alora_rpc_handled_total{{code="OK",method="/{SERVICE}/Prefill"}} 1.0' in text
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0


async def test_reflection_can_be_turned_off() -> None:
    with running("--reflection=false") as process:
        async with internal_channel(process.listening()["address"]) as channel:
            await prefill(channel, "quick")
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            # Nothing is written: a message to a call that has ended already is an INTERNAL error of the client's gRPC.
            asked = reflection.ServerReflectionInfo(timeout=TIMEOUT_SECONDS)
            assert await asked.code() is grpc.StatusCode.UNIMPLEMENTED


def test_it_does_not_listen_beyond_this_machine_without_tls_unless_that_is_allowed() -> None:
    with running("--listen=0.0.0.0:0") as process:
        status, told, log = process.end()
        assert (status, told) == (2, ["first", "second"]), "it cleans up, and says nowhere that it listens"
        assert "listen=0.0.0.0:0" in log
        assert "allow_insecure" in log
    with running("--listen=0.0.0.0:0", "--allow-insecure=true") as process:
        assert process.listening()["address"].startswith("0.0.0.0:")


async def test_health_has_a_port_of_its_own_where_nothing_else_is_served() -> None:
    with running("--health-listen=127.0.0.1:0") as process:
        address = process.listening()["health_address"]
        assert health_of(address, "", TIMEOUT_SECONDS) == health_of(address, SERVICE, TIMEOUT_SECONDS) == "SERVING"
        async with internal_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await prefill(channel, "quick")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0


def test_a_service_starts_where_traces_cannot_leave_as_the_environment_says() -> None:
    traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with running(**traces) as process:
        assert process.listening()["event"] == "listening"
        process.process.send_signal(signal.SIGTERM)
        status, _, log = process.end()
        assert (status, "no traces" in log) == (0, True)


def test_a_process_that_loads_is_alive_and_watched_and_does_not_serve_before_it_takes_calls() -> None:
    with running("--health-listen=127.0.0.1:0", LOADING="1") as process:
        word, health_address, metrics_address = process.line().split()
        assert word == "loading"
        names = (LIVENESS, STARTUP, SERVICE, "")
        told = {name: health_of(health_address, name, TIMEOUT_SECONDS) for name in names}
        assert told == {LIVENESS: "SERVING", STARTUP: "NOT_SERVING", SERVICE: "NOT_SERVING", "": "NOT_SERVING"}
        assert "alora_tasks" in scrape(metrics_address)
        assert process.process.stdin is not None
        process.process.stdin.write("\n")
        process.process.stdin.flush()
        assert process.listening()["health_address"] == health_address
        assert {health_of(health_address, name, TIMEOUT_SECONDS) for name in names} == {"SERVING"}
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_loads_at_once(number: signal.Signals) -> None:
    with running("--health-listen=127.0.0.1:0", LOADING="1") as process:
        health_address = process.line().split()[1]
        assert health_of(health_address, LIVENESS, TIMEOUT_SECONDS) == "SERVING"
        process.process.send_signal(number)
        assert process.end()[:2] == (-number, [])


async def test_drain_says_not_serving_refuses_new_calls_finishes_running_ones_and_cleans_up_in_order() -> None:
    with running() as process:
        address = process.listening()["address"]
        async with internal_channel(address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            watches = [
                health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_SECONDS)
                for name in ("", SERVICE, SERVICE)
            ]
            for watch in watches:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            unknown = health.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=TIMEOUT_SECONDS)
            assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            stub: Any = BasePrefillServiceStub(channel)
            status_stream = stub.WatchStatus(pb2.BasePrefillServiceWatchStatusRequest(), timeout=TIMEOUT_SECONDS)
            await status_stream.read()
            slow = prefill(channel, "slow")
            assert await asyncio.to_thread(process.line) == "running"
            # One of two watchers of a service leaves: the other still has to hear of the drain.
            watches.pop().cancel()

            process.process.send_signal(signal.SIGTERM)
            for watch in watches:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await asyncio.to_thread(process.line) == "drain"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await prefill(channel, "quick")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in str(caught.value.details())

            process.process.send_signal(signal.SIGUSR1)
            await slow
            # The endless status stream did not hold up the end.
            status, words, log = await asyncio.to_thread(process.end)
        assert (status, words) == (0, ["first", "second"])
        assert "a broken hook" in log


async def test_a_drain_that_takes_too_long_cancels_what_is_left() -> None:
    with running("--drain-seconds", "0.1") as process:
        address = process.listening()["address"]
        async with internal_channel(address) as channel:
            slow = prefill(channel, "slow")
            assert await asyncio.to_thread(process.line) == "running"
            process.process.send_signal(signal.SIGINT)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await slow
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            status, words, log = await asyncio.to_thread(process.end)
        assert (status, words) == (0, ["drain", "first", "second"])
        assert "drain_cut_short" in log


async def test_a_second_signal_ends_the_process_at_once() -> None:
    with running("--drain-seconds", "600") as process:
        address = process.listening()["address"]
        async with internal_channel(address) as channel:
            slow = prefill(channel, "slow")
            assert await asyncio.to_thread(process.line) == "running"
            process.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.line) == "drain"
            process.process.send_signal(signal.SIGTERM)
            status, words, _ = await asyncio.to_thread(process.end)
            slow.cancel()
        assert (status, words) == (-signal.SIGTERM, [])


async def test_the_end_of_something_essential_drains_and_fails_the_process() -> None:
    with running("--drain-seconds", "0") as process:
        address = process.listening()["address"]
        async with internal_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await prefill(channel, "die")
        status, words, log = await asyncio.to_thread(process.end)
        assert (status, words) == (1, ["running", "drain", "first", "second"])
        assert "the engine is gone" in log


@pytest.mark.parametrize(
    ("size_bytes", "code"),
    [(2 << 20, grpc.StatusCode.INVALID_ARGUMENT), (MAX_MESSAGE_BYTES, grpc.StatusCode.RESOURCE_EXHAUSTED)],
)
async def test_a_request_over_the_limit_is_refused_and_the_next_one_served(
    size_bytes: int, code: grpc.StatusCode
) -> None:
    with running() as process:
        async with internal_channel(process.listening()["address"]) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await prefill(channel, "x" * size_bytes)
            assert caught.value.code() is code
            await prefill(channel, "quick")


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def taken(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address that someone listens on."""
    host = "127.0.0.1" if request.param == socket.AF_INET else "::1"
    with socket.socket(request.param) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 loopback here")
        listener.listen()
        shown = host if request.param == socket.AF_INET else f"[{host}]"
        yield f"{shown}:{listener.getsockname()[1]}"


@pytest.mark.parametrize("setting", ["listen", "metrics_listen", "health_listen"])
def test_a_taken_port_stops_the_start_by_name(setting: str, taken: str) -> None:
    with running(f"--{setting.replace('_', '-')}", taken) as process:
        status, words, log = process.end()
    assert status == 2
    assert f"{setting}={taken}" in log
    assert "Traceback" not in log.partition("error: ")[2]
    assert words == (["first", "second"] if setting == "listen" else []), "the others are bound before it has loaded"


def test_a_wrong_setting_stops_the_start_by_name() -> None:
    with running("--drain-seconds", "soon") as process:
        status, _, log = process.end()
    assert status == 2
    assert "drain_seconds='soon'" in log


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_it_serves_on_ipv4_and_ipv6(host: str) -> None:
    if host == "[::1]" and not _has_ipv6():
        pytest.skip("no IPv6 loopback here")
    with running("--listen", f"{host}:0", "--metrics-listen", f"{host}:0") as process:
        told = process.listening()
        assert told["address"].startswith(host)
        async with internal_channel(told["address"]) as channel:
            await prefill(channel, "quick")
        assert "alora_rpc_handled_total" in await asyncio.to_thread(scrape, told["metrics_address"])


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("address", ["nowhere", ":80", "host:http"])
def test_an_address_without_a_port_stops_the_start(address: str) -> None:
    with running("--listen", "127.0.0.1:0", "--metrics-listen", address) as process:
        status, _, log = process.end()
    assert status == 2
    assert address in log
