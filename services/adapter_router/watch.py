"""The status streams of the two services, as the endpoint pool reads them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from alora_serve.rpc.convert import endpoint_status_from_proto
from alora_serve.types import EndpointStatus
from alora_serve.v1.adapter_decode_pb2 import AdapterDecodeServiceWatchStatusRequest
from alora_serve.v1.adapter_decode_pb2_grpc import AdapterDecodeServiceAsyncStub
from alora_serve.v1.base_prefill_pb2 import BasePrefillServiceWatchStatusRequest
from alora_serve.v1.base_prefill_pb2_grpc import BasePrefillServiceAsyncStub

# Waiting for the connection leaves the pace of reconnecting to the channel, whose options bound it.


async def watch_prefill(stub: BasePrefillServiceAsyncStub) -> AsyncGenerator[EndpointStatus, None]:
    """A base prefill's reports, until it goes away; closing it cancels the call."""
    call = stub.WatchStatus(BasePrefillServiceWatchStatusRequest(), wait_for_ready=True)
    try:
        async for response in call:
            yield endpoint_status_from_proto(response.status)
    finally:
        call.cancel()


async def watch_worker(stub: AdapterDecodeServiceAsyncStub) -> AsyncGenerator[EndpointStatus, None]:
    """A worker's reports, until it goes away; closing it cancels the call."""
    call = stub.WatchStatus(AdapterDecodeServiceWatchStatusRequest(), wait_for_ready=True)
    try:
        async for response in call:
            yield endpoint_status_from_proto(response.status)
    finally:
        call.cancel()
