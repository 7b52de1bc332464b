"""What ten thousand adapters cost the status stream, and that routers know them as they are, of either version."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pytest
from prometheus_client import CollectorRegistry

from adapter_decode.servicer import AdapterDecodeServicer
from adapter_router.endpoints.pool import EndpointSet
from alora_serve.kv.fingerprints import MAX_FINGERPRINTS, STRIDE_TOKENS
from alora_serve.metrics import RequestMetrics, RouterMetrics
from alora_serve.rpc import watch
from alora_serve.rpc.channels import internal_channel
from alora_serve.types import EndpointStatus, PrefixDigest
from alora_serve.v1 import adapter_decode_pb2 as pb
from alora_serve.v1.adapter_decode_pb2_grpc import (
    AdapterDecodeServiceStub,
    add_AdapterDecodeServiceServicer_to_server,
)
from fake_services import FakeWorker, Names, Server, adapter, endpoint_sets, model, start_server, start_worker, until

NUM_ADAPTERS: Final = 10_000
ADAPTERS: Final = tuple(adapter(f"adapter-{number:05}") for number in range(NUM_ADAPTERS))
ONE: Final = "adapter-04242"
KIB: Final = 1024


class Worker:
    """The real servicer's status stream, of a status that a test sets."""

    def __init__(self) -> None:
        self.status = EndpointStatus(model(), adapters=ADAPTERS)

    def change(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)

    def change_adapter(self, **changes: Any) -> None:
        self.change(adapters=tuple(replace(a, **changes) if a.name == ONE else a for a in self.status.adapters))

    def remove_adapter(self) -> None:
        self.change(adapters=tuple(a for a in self.status.adapters if a.name != ONE))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(watch, "REPEAT_SECONDS", 3600.0)  # a message a change, so that messages can be counted
    return Worker()


@pytest.fixture
async def server(worker: Worker) -> AsyncIterator[Server]:
    unused: Any = None
    metrics = RequestMetrics(CollectorRegistry())
    servicer = AdapterDecodeServicer(unused, unused, unused, lambda: worker.status, lambda: True, metrics)
    server = await start_server(partial(add_AdapterDecodeServiceServicer_to_server, servicer))
    yield server
    await server.kill()


@asynccontextmanager
async def watching(server: Server, **request: bool) -> AsyncIterator[Any]:
    async with internal_channel(server.address) as channel:
        stub: Any = AdapterDecodeServiceStub(channel)
        call = stub.WatchStatus(pb.AdapterDecodeServiceWatchStatusRequest(**request))
        yield call
        call.cancel()


@asynccontextmanager
async def known_by_a_router(server: Server) -> AsyncIterator[EndpointSet[Any]]:
    async with endpoint_sets([], [server.address], resolve=Names(), metrics=RouterMetrics(CollectorRegistry())) as (
        _,
        workers,
    ):
        await until(lambda: workers.snapshots()[0].healthy)
        yield workers


async def test_adapters_are_told_once_and_then_as_they_change(worker: Worker, server: Server) -> None:
    async with watching(server, accept_partial_adapters=True) as stream:
        first = await stream.read()
        assert (len(first.status.adapters), first.partial_adapters) == (NUM_ADAPTERS, False)
        assert first.ByteSize() > 500 * KIB

        worker.change(running=3, queued=2)
        busier = await stream.read()
        assert (busier.status.running, len(busier.status.adapters), busier.partial_adapters) == (3, 0, True)
        assert busier.ByteSize() < KIB

        most = frozenset(range(2**64 - MAX_FINGERPRINTS, 2**64))
        worker.change(running=4, resident_prefixes=PrefixDigest(STRIDE_TOKENS, most))
        assert (await stream.read()).ByteSize() < 9 * KIB, "8 KiB of it are fingerprints"
        worker.change(resident_prefixes=PrefixDigest())
        await stream.read()

        worker.change_adapter(resident=True)
        loaded = await stream.read()
        assert [(a.name, a.resident) for a in loaded.status.adapters] == [(ONE, True)]
        assert loaded.partial_adapters
        assert loaded.ByteSize() < KIB

        worker.remove_adapter()
        shorter = await stream.read()
        assert (len(shorter.status.adapters), shorter.partial_adapters) == (NUM_ADAPTERS - 1, False)


async def test_each_stream_begins_with_all_adapters(worker: Worker, server: Server) -> None:
    for _ in range(2):
        async with watching(server, accept_partial_adapters=True) as stream:
            assert len((await stream.read()).status.adapters) == NUM_ADAPTERS


async def test_a_router_knows_every_adapter_and_each_change(worker: Worker, server: Server) -> None:
    async with known_by_a_router(server) as workers:
        seen = workers.snapshots
        assert len(seen()[0].adapters) == NUM_ADAPTERS
        assert seen()[0].lacks_adapter(ONE)

        worker.change(running=3)
        await until(lambda: seen()[0].reported_load == 3)
        assert len(seen()[0].adapters) == NUM_ADAPTERS, "a message without adapters takes none away"

        worker.change_adapter(resident=True)
        await until(lambda: not seen()[0].lacks_adapter(ONE))
        assert sum(a.resident for a in seen()[0].adapters.values()) == 1
        worker.change_adapter(resident=False)
        await until(lambda: seen()[0].lacks_adapter(ONE))

        worker.change(adapters=(*worker.status.adapters, adapter("new")))
        await until(lambda: seen()[0].serves("new"))
        worker.remove_adapter()
        await until(lambda: not seen()[0].serves(ONE))
        assert len(seen()[0].adapters) == NUM_ADAPTERS
        assert seen()[0].serves("new")


async def test_a_router_of_an_earlier_version_is_told_all_adapters_every_time(worker: Worker, server: Server) -> None:
    async with watching(server) as stream:
        for running in range(1, 3):
            message = await stream.read()
            assert (len(message.status.adapters), message.partial_adapters) == (NUM_ADAPTERS, False)
            worker.change(running=running)


async def test_a_worker_of_an_earlier_version_tells_all_adapters_every_time() -> None:
    earlier = FakeWorker()  # ignores what it is asked
    server = await start_worker(earlier)
    async with known_by_a_router(server) as workers:
        assert workers.snapshots()[0].serves("certainty")
        earlier.report(running=1, adapters=(adapter("jailbreak", resident=True),))
        await until(lambda: workers.snapshots()[0].reported_load == 1)
        assert not workers.snapshots()[0].lacks_adapter("jailbreak")
        assert not workers.snapshots()[0].serves("certainty")
        earlier.report(running=2, adapters=())
        await until(lambda: not workers.snapshots()[0].adapters)
    await server.kill()


def test_listings_that_an_earlier_root_hides_change_nothing() -> None:
    hidden = adapter("a", problem="hidden")
    before, now = (adapter("a"), hidden), (adapter("a", resident=True), hidden, adapter("b"))
    changed = watch.changed_adapters(before, now)
    assert changed == (adapter("a", resident=True), adapter("b"))
    assert watch.with_changes(before, changed) == changed
