"""Calls endpoints on behalf of a request: within its deadline, and again elsewhere when one is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import structlog
from grpc import aio

from adapter_router.endpoints.endpoint import Endpoint
from adapter_router.endpoints.pool import EndpointSet
from adapter_router.policy import Demand
from alora_serve.errors import (
    AloraServeError,
    DeadlinePassedError,
    OverloadedError,
    RequestCancelledError,
    StepFailedError,
    UnavailableError,
)
from alora_serve.kv.tenancy import NO_TENANT
from alora_serve.rpc.status import REQUEST_ID_KEY, MessageTooLargeError, error_from_rpc, is_own_status
from alora_serve.rpc.tracing import client_span, trace_metadata
from alora_serve.telemetry import current

StubT = TypeVar("StubT")
ResponseT = TypeVar("ResponseT")

_OUTCOMES: Final[Mapping[type[AloraServeError], str]] = {
    UnavailableError: "is gone; send it again",
    DeadlinePassedError: "did not answer before the deadline; allow it more time",
    MessageTooLargeError: "cannot be sent a message this large, or cannot send its answer; shorten the request",
}
"""What became of a request where the peer itself did not say."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One public call, for as long as it runs.

    Attributes:
        request_id: names it in the logs of every service.
        arrived_seconds: when it arrived, on the monotonic clock.
        due_seconds: when it must have been answered, on the same clock.
        tenant: for whom; empty without tenants.
        tenant_salt: what keeps that tenant's handles and KV apart.
    """

    request_id: str
    arrived_seconds: float
    due_seconds: float
    tenant: str = ""
    tenant_salt: bytes = NO_TENANT

    @classmethod
    def arriving(cls, request_id: str, within_seconds: float, tenant: str = "", tenant_salt: bytes = NO_TENANT) -> Call:
        """A call that arrives now and must be answered ``within_seconds``."""
        now = time.monotonic()
        return cls(request_id, now, now + within_seconds, tenant, tenant_salt)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What calls made on its behalf carry; in a trace, that the current span makes them."""
        return ((REQUEST_ID_KEY, self.request_id), *trace_metadata())

    def elapsed_seconds(self) -> float:
        """Since it arrived."""
        return time.monotonic() - self.arrived_seconds

    def remaining_seconds(self) -> float:
        """Time left for a call made on its behalf.

        Raises:
            DeadlinePassedError: none is left.
        """
        remaining = self.due_seconds - time.monotonic()
        if remaining <= 0:
            raise DeadlinePassedError("the deadline passed before the request was answered")
        return remaining


class Retries(Generic[StubT]):
    """What one request has tried, and whether it may try again.

    An endpoint that is lost, or whose step broke, may be followed by others, ``max_attempts`` calls in a row that got
    the request no further; one that is full by one other. Every other failure is the request's own.

    Attributes:
        attempt: number of the call, from 0.
        failed: addresses whose calls failed since the request last got further.
    """

    def __init__(self, endpoints: EndpointSet[StubT], demand: Demand, max_attempts: int) -> None:
        self.attempt = 0
        self.failed: set[str] = set()
        self._endpoints = endpoints
        self._demand = demand
        self._max_attempts = max_attempts
        self._in_vain = 0
        self._found_full = False

    def got_further(self) -> None:
        """The call that ends now was not in vain: whatever failed before it counts no more."""
        self._in_vain = 0
        self._found_full = False
        self.failed.clear()

    def after(self, endpoint: Endpoint[StubT], error: AloraServeError, *, elsewhere: bool = False) -> None:
        """Note a failed call and return when another may follow.

        Args:
            elsewhere: another endpoint may do what this one refused.

        Raises:
            AloraServeError: ``error``, when no call may follow.
        """
        self.failed.add(endpoint.address)
        self._in_vain += 1
        again = False
        if isinstance(error, UnavailableError | StepFailedError):
            if isinstance(error, UnavailableError):
                self._endpoints.mark_unreachable(endpoint)
            again = self._in_vain < self._max_attempts
        elif elsewhere or (isinstance(error, OverloadedError) and not self._found_full):
            self._found_full = True
            again = self._endpoints.has_other(self._demand, self.failed)
        if not again:
            raise error
        self.attempt += 1
        self._endpoints.note_retry()


@contextmanager
def peer_errors(service: str, address: str) -> Iterator[None]:
    """Turn a failed RPC into our own error, fit for a client.

    A peer that cancels a call nobody here cancelled is shutting down, which is as good as gone. What a peer says about
    the request is passed on; how it was reached and lost is for the log, since gRPC and proxies name addresses.

    Raises:
        AloraServeError: for every :class:`grpc.aio.AioRpcError`.
    """
    try:
        yield
    except aio.AioRpcError as rpc_error:
        error = error_from_rpc(rpc_error)
        if isinstance(error, RequestCancelledError | UnavailableError):
            raise peer_failure(UnavailableError, service, address, str(error)) from rpc_error
        if not is_own_status(rpc_error):
            raise peer_failure(type(error), service, address, str(error)) from rpc_error
        raise error from rpc_error


def peer_failure(kind: type[AloraServeError], service: str, address: str, cause: str) -> AloraServeError:
    """The error of a call that a peer did not end itself: the kind of service for the client, the rest for the log."""
    _log.warning("call failed", role=service, address=address, status=kind.status, cause=cause)
    outcome = _OUTCOMES.get(kind, f"failed with {kind.status}; report the request id")
    return kind(f"the {service} endpoint that had this request {outcome}")


async def call_endpoint(
    endpoints: EndpointSet[StubT],
    demand: Demand,
    invoke: Callable[[Endpoint[StubT]], Awaitable[ResponseT]],
    *,
    method: str,
    max_attempts: int,
    wait_seconds: float | None = None,
) -> ResponseT:
    """Make one unary, repeatable call at the endpoint ``demand`` prefers, and again as :class:`Retries` allows.

    Args:
        endpoints: who may serve it.
        demand: what it needs.
        invoke: makes the call.
        method: which it calls, ``/package.Service/Method``.
        max_attempts: calls in all.
        wait_seconds: longest wait for an endpoint that is fit; unset, as long as the set's options say.

    Raises:
        UnavailableError: no endpoint could take it.
        DeadlinePassedError: in time.
        AloraServeError: what the endpoint answered.
    """
    retries = Retries(endpoints, demand, max_attempts)
    while True:
        async with endpoints.lease(demand, avoid=retries.failed, wait_seconds=wait_seconds) as lease:
            endpoint = lease.endpoint
            try:
                with (
                    client_span(method, endpoint.address, {"alora.attempt": retries.attempt}) as span,
                    current(span),
                    peer_errors(endpoints.service, endpoint.address),
                ):
                    return await unless_silent(endpoint, invoke(endpoint), endpoints.service)
            except AloraServeError as error:
                retries.after(endpoint, error)


async def unless_silent(endpoint: Endpoint[StubT], call: Awaitable[ResponseT], service: str) -> ResponseT:
    """What the call comes to, unless its endpoint falls silent: a call to a process that hangs would wait for it.

    Raises:
        UnavailableError: the endpoint fell silent.
        grpc.aio.AioRpcError: the call failed.
    """
    calling = asyncio.ensure_future(call)
    falling_silent = asyncio.create_task(endpoint.silent.wait())
    try:
        await asyncio.wait((calling, falling_silent), return_when=asyncio.FIRST_COMPLETED)
        if calling.done():
            return await calling
    finally:
        calling.cancel()
        falling_silent.cancel()
    raise peer_failure(UnavailableError, service, endpoint.address, "it fell silent")
