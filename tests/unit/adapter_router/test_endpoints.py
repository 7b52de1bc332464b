"""Endpoints on real sockets: how they are found, when they are healthy, what becomes of those that leave."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from adapter_router.affinity import rendezvous_order
from adapter_router.endpoints.endpoint import EndpointOptions
from adapter_router.endpoints.pool import EndpointSet
from adapter_router.peers import _watch_worker
from adapter_router.policy import Demand
from alora_serve.errors import ConfigError, InvalidRequestError, UnavailableError
from alora_serve.metrics import RouterMetrics
from alora_serve.rpc.channels import internal_channel
from alora_serve.types import EndpointStatus
from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceStub
from fake_services import (
    FAST,
    FakePrefill,
    FakeWorker,
    Names,
    endpoint_sets,
    healthy,
    model,
    start_prefill,
    start_worker,
    until,
)

BASE = Demand(b"key", {model().model_digest})


@asynccontextmanager
async def pool_on(
    targets: list[str], *, options: EndpointOptions = FAST, names: Any = None, registry: CollectorRegistry | None = None
) -> AsyncIterator[EndpointSet[Any]]:
    metrics = RouterMetrics(registry or CollectorRegistry())
    async with endpoint_sets([], targets, options=options, resolve=names or Names(), metrics=metrics) as (_, workers):
        yield workers


async def test_an_endpoint_is_healthy_once_its_status_stream_answers() -> None:
    server = await start_worker(FakeWorker())
    async with pool_on([server.address]) as workers:
        assert healthy(workers) == 0
        await until(lambda: healthy(workers) == 1)
        snapshot = workers.snapshots()[0]
        assert snapshot.model_digest == model().model_digest
        assert snapshot.serves("jailbreak")
        assert not snapshot.serves("broken")
    await server.kill()


async def test_that_none_is_healthy_is_told_before_any_was_found_and_of_none_that_nobody_looks_for() -> None:
    registry, asked = CollectorRegistry(), asyncio.Event()

    async def unanswered(_target: str) -> frozenset[str]:
        asked.set()
        await asyncio.Event().wait()
        return frozenset()

    async def enter() -> None:
        metrics = RouterMetrics(registry)
        async with endpoint_sets(["base-prefill:50051"], [], resolve=unanswered, metrics=metrics):
            pass

    entering = asyncio.ensure_future(enter())
    await asked.wait()
    for role, count in (("base_prefill", 0.0), ("adapter_decode", None)):
        for state in ("healthy", "draining", "down"):
            assert registry.get_sample_value("alora_router_endpoints", {"role": role, "state": state}) == count
    entering.cancel()


async def test_a_base_prefill_is_watched_the_same_way() -> None:
    server = await start_prefill(FakePrefill())
    metrics = RouterMetrics(CollectorRegistry())
    async with endpoint_sets([server.address], [], resolve=Names(), metrics=metrics) as (prefills, _):
        await until(lambda: healthy(prefills) == 1)
    await server.kill()


async def test_a_dead_endpoint_is_unhealthy_and_comes_back_when_its_stream_answers() -> None:
    server = await start_worker(FakeWorker())
    async with pool_on([server.address]) as workers:
        await until(lambda: healthy(workers) == 1)
        await server.kill()
        await until(lambda: healthy(workers) == 0)
        again = await start_worker(FakeWorker(), server.address)
        await until(lambda: healthy(workers) == 1)
    await again.kill()


async def test_an_endpoint_that_falls_silent_is_unhealthy_though_its_connection_lives() -> None:
    worker = FakeWorker()
    server = await start_worker(worker)
    async with pool_on([server.address], options=dataclasses.replace(FAST, silence_seconds=0.2)) as workers:
        await until(lambda: healthy(workers) == 1)
        await until(lambda: healthy(workers) == 0)
        # It is asked anew, and answers, as often as it falls silent.
        await until(lambda: worker.watches > 1 and healthy(workers) == 1)
    await server.kill()


def worker_set(address: str, connect: Callable[[str], Any], **options: Any) -> EndpointSet[Any]:
    """Those of one address, reached by a way of the test's own."""
    usual: dict[str, Any] = {
        "make_stub": AdapterDecodeServiceStub,
        "watch": _watch_worker,
        "options": FAST,
        "metrics": RouterMetrics(CollectorRegistry()),
        "on_change": lambda: None,
    }
    return EndpointSet[Any]("adapter_decode", [address], connect=connect, **{**usual, **options})


async def test_a_status_that_cannot_be_read_is_not_health() -> None:
    async def unreadable(stub: Any) -> AsyncGenerator[EndpointStatus, None]:
        opened.append(stub)
        if stub:
            raise InvalidRequestError.of("adapter.invocation_token_ids", "three bytes are no tokens")
        yield EndpointStatus(model())

    opened: list[Any] = []
    workers = worker_set("127.0.0.1:1", internal_channel, make_stub=lambda channel: channel, watch=unreadable)
    async with workers:
        await until(lambda: len(opened) > 1)
        assert healthy(workers) == 0


async def test_an_unreachable_call_makes_an_endpoint_unhealthy_until_its_stream_speaks() -> None:
    worker = FakeWorker()
    server = await start_worker(worker)
    async with pool_on([server.address]) as workers:
        await until(lambda: healthy(workers) == 1)
        async with workers.lease(BASE) as lease:
            workers.mark_unreachable(lease.endpoint)
            assert healthy(workers) == 0
            with pytest.raises(UnavailableError, match="no adapter_decode endpoint can take a request for the base"):
                async with workers.lease(BASE):
                    raise AssertionError("an unreachable endpoint was leased")
        worker.repeat()
        await until(lambda: healthy(workers) == 1)
    await server.kill()


async def test_a_lease_waits_for_an_endpoint_that_is_about_to_be_fit() -> None:
    server = await start_worker(FakeWorker())
    options = dataclasses.replace(FAST, wait_seconds=20)
    async with pool_on([server.address], options=options) as workers, workers.lease(BASE) as lease:
        assert lease.endpoint.address == server.address
    await server.kill()


async def test_a_draining_endpoint_takes_nothing_new() -> None:
    worker = FakeWorker()
    server = await start_worker(worker)
    registry = CollectorRegistry()
    async with pool_on([server.address], registry=registry) as workers:
        await until(lambda: healthy(workers) == 1)
        worker.report(draining=True)
        await until(lambda: workers.snapshots()[0].draining)
        with pytest.raises(UnavailableError):
            async with workers.lease(BASE):
                raise AssertionError("a draining endpoint was leased")
        labels = {"role": "adapter_decode", "state": "draining"}
        assert registry.get_sample_value("alora_router_endpoints", labels) == 1
    await server.kill()


async def test_leases_are_counted_as_they_are_picked_and_spill_over_by_the_bound() -> None:
    servers = [await start_worker(FakeWorker()) for _ in range(2)]
    registry = CollectorRegistry()
    async with pool_on([server.address for server in servers], registry=registry) as workers:
        await until(lambda: healthy(workers) == 2)
        preferred, other = rendezvous_order(BASE.key, [server.address for server in servers])
        async with workers.lease(BASE) as first, workers.lease(BASE) as second, workers.lease(BASE) as third:
            # Bound of the third: ceil(1.25 x 3 / 2) = 2 an endpoint.
            assert [lease.endpoint.address for lease in (first, second, third)] == [preferred, preferred, other]
            assert {e.address: e.in_flight for e in workers.members()} == {preferred: 2, other: 1}
        assert [e.in_flight for e in workers.members()] == [0, 0]
        picks = [
            registry.get_sample_value("alora_router_picks_total", {"role": "adapter_decode", "reason": reason})
            for reason in ("affinity", "load")
        ]
        assert picks == [2, 1]
    for server in servers:
        await server.kill()


async def test_failed_endpoints_are_taken_again_only_when_no_other_may_be() -> None:
    servers = [await start_worker(FakeWorker()) for _ in range(2)]
    addresses = [server.address for server in servers]
    async with pool_on(addresses) as workers:
        await until(lambda: healthy(workers) == 2)
        async with workers.lease(BASE, avoid={addresses[0]}) as lease:
            assert lease.endpoint.address == addresses[1]
        assert workers.has_other(BASE, {addresses[0]})
        assert not workers.has_other(BASE, addresses)
        async with workers.lease(BASE, avoid=addresses) as lease:
            assert lease.endpoint.address in addresses
    for server in servers:
        await server.kill()


async def test_addresses_of_a_name_come_and_go_while_running() -> None:
    servers = [await start_worker(FakeWorker()) for _ in range(2)]
    first, second = (server.address for server in servers)
    names = Names({"workers:1": {first}})
    async with pool_on(["workers:1"], names=names) as workers:
        await until(lambda: healthy(workers) == 1)
        names.known["workers:1"] = {first, second}
        await until(lambda: healthy(workers) == 2)
        names.known["workers:1"] = {second}
        await until(lambda: [e.address for e in workers.members()] == [second])
    for server in servers:
        await server.kill()


async def test_a_removed_endpoint_keeps_its_channel_until_its_last_request_is_done() -> None:
    server = await start_worker(FakeWorker())
    names = Names({"workers:1": {server.address}})
    async with pool_on(["workers:1"], names=names) as workers:
        await until(lambda: healthy(workers) == 1)
        async with workers.lease(BASE) as lease:
            names.known["workers:1"] = set()
            await until(lambda: not workers.members())
            assert lease.endpoint.channel.get_state().name != "SHUTDOWN"
        await until(lambda: lease.endpoint.channel.get_state().name == "SHUTDOWN")
    await server.kill()


async def test_a_removed_endpoint_that_hangs_is_known_to_until_its_last_request_is_done() -> None:
    """A call to it would wait for it until its deadline."""
    worker = FakeWorker()
    server = await start_worker(worker)
    names = Names({"workers:1": {server.address}})

    def watches() -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("watch ")]

    async with pool_on(["workers:1"], names=names, options=dataclasses.replace(FAST, silence_seconds=0.5)) as workers:
        await until(lambda: healthy(workers) == 1)
        async with workers.lease(BASE) as lease:
            names.known["workers:1"] = set()
            await until(lambda: not workers.members())
            worker.repeat()
            await until(lambda: not lease.endpoint.silent.is_set())
            await until(lease.endpoint.silent.is_set)  # it reports no more
        await until(lambda: not watches())
    await server.kill()


async def test_a_failed_look_up_keeps_what_was_known() -> None:
    server = await start_worker(FakeWorker())
    looked_up = 0

    async def flaky(target: str) -> frozenset[str]:
        nonlocal looked_up
        looked_up += 1
        if looked_up > 1:
            raise UnavailableError("no such name")
        return frozenset({server.address})

    async with pool_on(["workers:1"], names=flaky) as workers:
        await until(lambda: looked_up > 3 and healthy(workers) == 1)
    await server.kill()


async def test_certificates_that_are_gone_for_a_moment_cost_no_endpoint() -> None:
    files: dict[str, Any] = {"version": 1, "problem": None}
    made: list[tuple[str, int]] = []

    def connect(address: str) -> Any:
        if files["problem"] is not None:
            raise ConfigError(files["problem"])
        made.append((address, files["version"]))
        return internal_channel(address)

    servers = [await start_worker(FakeWorker()) for _ in range(2)]
    first, second = (server.address for server in servers)
    names = Names({"workers:1": {first}})
    workers = worker_set("workers:1", connect, resolve=names, certificates=lambda: files["version"])
    async with workers:
        await until(lambda: healthy(workers) == 1)
        before = workers.members()
        with capture_logs() as logs:
            files |= {"version": 2, "problem": "peer_tls_cert_file tls.crt: No such file or directory"}
            names.known["workers:1"] = {first, second}
            await until(lambda: sum("No such file" in line.get("error", "") for line in logs) > 3)
        assert workers.members() == before
        assert healthy(workers) == 1
        files |= {"version": 3, "problem": None}
        await until(lambda: healthy(workers) == 2)
        assert made == [(first, 1), (first, 3), (second, 3)]
        assert not workers.looking.done()
    for server in servers:
        await server.kill()


async def test_new_certificates_make_no_endpoint_unfit_for_a_moment() -> None:
    version, seen = 1, list[int]()
    worker = FakeWorker()
    server = await start_worker(worker)
    workers = worker_set(
        server.address,
        internal_channel,
        certificates=lambda: version,
        on_change=lambda: seen.append(healthy(workers)),
    )
    async with workers:
        await until(lambda: healthy(workers) == 1)
        (before,) = workers.members()
        seen.clear()
        version = 2
        await until(lambda: before.retired)
        async with workers.lease(BASE, wait_seconds=0) as lease:
            assert lease.endpoint is not before
        await until(lambda: worker.watches == 2)
        assert set(seen) == {1}
    await server.kill()


async def test_a_set_that_cannot_connect_is_not_entered() -> None:
    def connect(address: str) -> Any:
        raise ConfigError("peer_tls_ca_file ca.crt: No such file or directory")

    with pytest.raises(ConfigError):
        async with worker_set("127.0.0.1:1", connect):
            pytest.fail("it was entered")


async def test_a_defect_that_ends_the_look_ups_is_seen_by_whoever_watches() -> None:
    looked_up = 0

    async def broken(target: str) -> frozenset[str]:
        nonlocal looked_up
        looked_up += 1
        return frozenset() if looked_up == 1 else frozenset({1 / 0})  # type: ignore[arg-type]

    async with pool_on(["workers:1"], names=broken) as workers:
        await until(workers.looking.done)
        assert isinstance(workers.looking.exception(), ZeroDivisionError)


async def test_a_fan_out_stays_together_while_the_bound_allows() -> None:
    servers = [await start_worker(FakeWorker()) for _ in range(2)]
    async with pool_on([server.address for server in servers]) as workers:
        await until(lambda: healthy(workers) == 2)
        together: set[str] = set()
        async with AsyncExitStack() as held:
            for left in range(6, 0, -1):
                demand = dataclasses.replace(BASE, group_size=left, together=together)
                await held.enter_async_context(workers.lease(demand))
            # Bound: ceil(1.25 x 6 / 2) = 4 an endpoint.
            assert sorted(endpoint.in_flight for endpoint in workers.members()) == [2, 4]
            assert together == {server.address for server in servers}
    for server in servers:
        await server.kill()


@pytest.mark.parametrize(
    ("step_seconds", "seconds", "late", "early"), [(0.5, 0.7, 1, 0), (0.5, 0.2, 0, 1), (0.0, 0.2, 0, 0)]
)
async def test_first_tokens_are_compared_with_their_prediction_where_there_was_one(
    step_seconds: float, seconds: float, late: int, early: int
) -> None:
    server = await start_worker(FakeWorker(status=EndpointStatus(model(), step_seconds=step_seconds)))
    registry = CollectorRegistry()
    async with pool_on([server.address], registry=registry) as workers:
        await until(lambda: healthy(workers) == 1)
        async with workers.lease(BASE) as lease:
            assert lease.predicted_seconds == step_seconds
            workers.note_first_token(lease, seconds)
    counts = [
        registry.get_sample_value(
            "alora_router_prediction_error_seconds_count", {"role": "adapter_decode", "direction": direction}
        )
        for direction in ("late", "early")
    ]
    assert [count or 0 for count in counts] == [late, early]
    await server.kill()
