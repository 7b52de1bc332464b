"""Which calls a router takes at all: as many at once as it may hold, within their tenants' quotas."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import structlog
from google.protobuf.message import Message
from grpc import aio

from adapter_router.access.quotas import Quotas
from adapter_router.dispatch import Call
from alora_serve.errors import OverloadedError
from alora_serve.kv.tenancy import TenantSalts
from alora_serve.metrics import RouterMetrics
from alora_serve.rpc.caller import CALLER

Context: TypeAlias = aio.ServicerContext[Any, Any]

BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Bounds on what one router does.

    Attributes:
        max_attempts: endpoints tried in a row that get a request no further.
        max_in_flight: requests at once before RESOURCE_EXHAUSTED; a fan-out is one.
        default_deadline_seconds: of calls whose client set none.
        silence_seconds: after so long without an event a stream's worker is lost.
        resume_wait_seconds: longest wait of a stream that has begun for a worker that can go on with it.
    """

    max_attempts: int = 3
    max_in_flight: int = 1000
    default_deadline_seconds: float = 600.0
    silence_seconds: float = 3.0
    resume_wait_seconds: float = 30.0


class Admission:
    """Makes :class:`Call` of what arrives, and counts those that run."""

    def __init__(self, limits: RouterLimits, salts: TenantSalts, quotas: Quotas, metrics: RouterMetrics) -> None:
        """Keep the rules; nothing is in flight yet."""
        self._limits = limits
        self._salts = salts
        self._quotas = quotas
        self._metrics = metrics
        self._in_flight = 0

    @contextmanager
    def admitted(self, context: Context, request: Message, *, sequences: int) -> Iterator[Call]:
        """Count a call among those in flight while the block runs, or refuse it at once: nothing queues without bound.

        Args:
            context: of the RPC.
            request: as it came; its size bounds the prompt's tokens.
            sequences: how many it wants to run at once.

        Raises:
            OverloadedError: the router is full, or the tenant's quota is used up.
        """
        if self._in_flight >= self._limits.max_in_flight:
            raise OverloadedError(
                f"the router holds {self._in_flight} requests, as many as it takes; retry later",
                # Spread, so that those refused together do not come back together.
                retry_after_seconds=random.uniform(0.5, 1.5),
            )
        call = self.call(context)
        # Not tokenized yet: four bytes a token, as text has on average and packed ids have exactly.
        prompt_tokens = request.ByteSize() // BYTES_PER_TOKEN
        with self._quotas.hold(call.tenant, sequences=sequences, prompt_tokens=prompt_tokens):
            self._count(+1)
            try:
                yield call
            finally:
                self._count(-1)

    def call(self, context: Context) -> Call:
        """What the RPC may use: its time, its caller's tenant and that tenant's salt. Not counted."""
        remaining = cast("float | None", context.time_remaining())  # the stubs forget calls without a deadline
        within_seconds = self._limits.default_deadline_seconds if remaining is None else remaining
        # The server's interceptor has bound the id that the client gave or a new one.
        tenant = CALLER.get().tenant
        return Call.arriving(
            structlog.contextvars.get_contextvars()["request_id"], within_seconds, tenant, self._salts.of(tenant)
        )

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._metrics.in_flight(self._in_flight)
