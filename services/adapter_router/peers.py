"""The two services behind the router: the pools of their endpoints, and their status streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from adapter_router.endpoints.endpoint import EndpointOptions
from adapter_router.endpoints.pool import EndpointSet
from adapter_router.endpoints.resolver import Resolver, resolve_target
from alora_serve.metrics import RouterMetrics
from alora_serve.rpc.channels import internal_channel
from alora_serve.rpc.convert import endpoint_status_from_proto
from alora_serve.rpc.tls import ClientTls
from alora_serve.rpc.watch import with_changes
from alora_serve.types import AdapterInfo, EndpointStatus
from alora_serve.v1.adapter_decode_pb2 import AdapterDecodeServiceWatchStatusRequest
from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceStub
from alora_serve.v1.base_prefill_pb2 import BasePrefillServiceWatchStatusRequest
from alora_serve.v1.base_prefill_pb2_grpc import BasePrefillServiceStub

if TYPE_CHECKING:  # the asyncio stubs are types only
    from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceAsyncStub
    from alora_serve.v1.base_prefill_pb2_grpc import BasePrefillServiceAsyncStub

    PrefillStub: TypeAlias = BasePrefillServiceAsyncStub
    WorkerStub: TypeAlias = AdapterDecodeServiceAsyncStub
    Prefills: TypeAlias = EndpointSet[PrefillStub]
    Workers: TypeAlias = EndpointSet[WorkerStub]


def prefill_pool(
    targets: Sequence[str],
    options: EndpointOptions,
    metrics: RouterMetrics,
    *,
    on_change: Callable[[], None],
    resolve: Resolver = resolve_target,
    tls: ClientTls | None = None,
) -> Prefills:
    """The base prefill endpoints at ``targets``, to be entered."""
    return EndpointSet(
        "base_prefill",
        targets,
        connect=partial(internal_channel, tls=tls),
        certificates=tls.versions if tls else tuple,
        make_stub=BasePrefillServiceStub,
        watch=_watch_prefill,
        options=options,
        metrics=metrics,
        on_change=on_change,
        resolve=resolve,
    )


def worker_pool(
    targets: Sequence[str],
    options: EndpointOptions,
    metrics: RouterMetrics,
    *,
    on_change: Callable[[], None],
    resolve: Resolver = resolve_target,
    tls: ClientTls | None = None,
) -> Workers:
    """The decode workers at ``targets``, to be entered."""
    return EndpointSet(
        "adapter_decode",
        targets,
        connect=partial(internal_channel, tls=tls),
        certificates=tls.versions if tls else tuple,
        make_stub=AdapterDecodeServiceStub,
        watch=_watch_worker,
        options=options,
        metrics=metrics,
        on_change=on_change,
        resolve=resolve,
    )


# Waiting for the connection leaves the pace of reconnecting to the channel, whose options bound it.


async def _watch_prefill(stub: PrefillStub) -> AsyncGenerator[EndpointStatus, None]:
    call = stub.WatchStatus(BasePrefillServiceWatchStatusRequest(), wait_for_ready=True)
    try:
        async for response in call:
            yield endpoint_status_from_proto(response.status)
    finally:
        call.cancel()


async def _watch_worker(stub: WorkerStub) -> AsyncGenerator[EndpointStatus, None]:
    request = AdapterDecodeServiceWatchStatusRequest(accept_partial_adapters=True)
    call, known = stub.WatchStatus(request, wait_for_ready=True), tuple[AdapterInfo, ...]()
    try:
        async for response in call:
            status = endpoint_status_from_proto(response.status)
            known = with_changes(known, status.adapters) if response.partial_adapters else status.adapters
            yield replace(status, adapters=known)
    finally:
        call.cancel()
