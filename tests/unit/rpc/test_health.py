"""Health is told to everyone who asks or watches, and the end is final."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alora_serve.rpc.channels import internal_channel, server_options
from alora_serve.rpc.health import LIVENESS, STARTUP, HealthServicer

SERVICE = "alora_serve.v1.AloraService"
TIMEOUT_SECONDS = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Served:
    """A health servicer on a socket, and a stub for it."""

    def __init__(self, *, started: bool) -> None:
        self.health = HealthServicer([SERVICE], serving=False, started=started)
        self.server = grpc.aio.server(options=server_options())
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.channel = internal_channel(f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}")
        self.stub: Any = health_pb2_grpc.HealthStub(self.channel)

    async def check(self, name: str) -> int:
        answer = await self.stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_SECONDS)
        return int(answer.status)

    def watch(self, name: str) -> Any:
        return self.stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_SECONDS)


@asynccontextmanager
async def on_a_socket(*, started: bool) -> AsyncIterator[Served]:
    served = Served(started=started)
    await served.server.start()
    yield served
    await served.channel.close()
    await served.server.stop(0)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with on_a_socket(started=True) as served:
        yield served


@pytest.fixture
async def loading() -> AsyncIterator[Served]:
    async with on_a_socket(started=False) as served:
        yield served


async def test_a_process_is_alive_whatever_it_serves(served: Served) -> None:
    assert await served.check(LIVENESS) == SERVING
    served.health.shut_down()
    assert await served.check(LIVENESS) == SERVING
    assert await served.check("") == NOT_SERVING


async def test_a_process_in_which_something_hangs_for_good_is_not_alive(served: Served) -> None:
    hangs = False
    served.health.live_while(lambda: not hangs)
    assert await served.check(LIVENESS) == SERVING
    hangs = True
    assert await served.check(LIVENESS) == NOT_SERVING
    served.health.set_serving(True)
    assert await served.check("") == SERVING, "who may ask it is told by its status"


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_watchers_hear_every_change_and_the_end_is_final(served: Served, name: str) -> None:
    watch = served.watch(name)
    assert (await watch.read()).status == NOT_SERVING
    served.health.set_serving(True)
    assert (await watch.read()).status == SERVING
    assert await served.check(name) == SERVING
    served.health.set_serving(True)  # no change, so nothing to tell
    served.health.set_serving(False)
    assert (await watch.read()).status == NOT_SERVING
    served.health.set_serving(True)
    assert (await watch.read()).status == SERVING
    served.health.shut_down()
    assert (await watch.read()).status == NOT_SERVING
    served.health.set_serving(True)
    assert await served.check(name) == NOT_SERVING


async def test_what_has_not_started_serves_nothing_and_what_has_says_so_to_its_end(loading: Served) -> None:
    watch = loading.watch(SERVICE)
    assert (await watch.read()).status == NOT_SERVING
    loading.health.set_serving(True)
    assert [await loading.check(name) for name in (STARTUP, SERVICE, LIVENESS)] == [NOT_SERVING, NOT_SERVING, SERVING]
    loading.health.start()
    assert (await watch.read()).status == SERVING
    loading.health.set_serving(False)
    loading.health.shut_down()
    assert [await loading.check(name) for name in (STARTUP, SERVICE, LIVENESS)] == [SERVING, NOT_SERVING, SERVING]


async def test_a_watcher_that_leaves_takes_no_other_with_it(served: Served) -> None:
    first, second = served.watch(SERVICE), served.watch(SERVICE)
    for watch in (first, second):
        assert (await watch.read()).status == NOT_SERVING
    first.cancel()
    await first.code()
    await served.check(SERVICE)  # the server has handled the cancellation before this
    served.health.set_serving(True)
    assert (await second.read()).status == SERVING


async def test_a_service_that_is_not_here_is_unknown(served: Served) -> None:
    assert (await served.watch("nobody").read()).status == SERVICE_UNKNOWN
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.check("nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
