"""Which calls a router takes at all: as many at once as it may hold, within their tenants' quotas."""

from __future__ import annotations

import random
from collections import Counter
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
        tenant_share: how much of them one tenant may hold; those of no tenant may hold all.
        default_deadline_seconds: of calls whose client set none.
        silence_seconds: after so long without an event a stream's worker is lost.
        resume_wait_seconds: longest wait of a stream that has begun for a worker that can go on with it.
    """

    max_attempts: int = 3
    max_in_flight: int = 1000
    tenant_share: float = 0.75
    default_deadline_seconds: float = 600.0
    silence_seconds: float = 3.0
    resume_wait_seconds: float = 30.0

    @property
    def tenant_in_flight(self) -> int:
        """Requests of one tenant at once."""
        return max(1, int(self.max_in_flight * self.tenant_share))


class Admission:
    """Makes :class:`Call` of what arrives, and counts those that run."""

    def __init__(self, limits: RouterLimits, salts: TenantSalts, quotas: Quotas, metrics: RouterMetrics) -> None:
        """Keep the rules; nothing is in flight yet."""
        self._limits = limits
        self._salts = salts
        self._quotas = quotas
        self._metrics = metrics
        self._in_flight: Counter[str] = Counter()  # by tenant

    @contextmanager
    def admitted(self, context: Context, request: Message, *, sequences: int) -> Iterator[Call]:
        """Count a call among those in flight while the block runs, or refuse it at once: nothing queues without bound.

        Args:
            context: of the RPC.
            request: as it came; its size bounds the prompt's tokens.
            sequences: how many it wants to run at once.

        Raises:
            OverloadedError: the router is full, or holds as much of the tenant as it may, or its quota is used up.
        """
        call = self.call(context)
        self._check_room(call.tenant)
        # Not tokenized yet: four bytes a token, as text has on average and packed ids have exactly.
        prompt_tokens = request.ByteSize() // BYTES_PER_TOKEN
        with self._quotas.hold(call.tenant, sequences=sequences, prompt_tokens=prompt_tokens):
            self._count(call.tenant, +1)
            try:
                yield call
            finally:
                self._count(call.tenant, -1)

    def call(self, context: Context) -> Call:
        """What the RPC may use: its time, its caller's tenant and that tenant's salt. Not counted."""
        remaining = cast("float | None", context.time_remaining())  # the stubs forget calls without a deadline
        within_seconds = self._limits.default_deadline_seconds if remaining is None else remaining
        # The server's interceptor has bound the id that the client gave or a new one.
        tenant = CALLER.get().tenant
        return Call.arriving(
            structlog.contextvars.get_contextvars()["request_id"], within_seconds, tenant, self._salts.of(tenant)
        )

    def _check_room(self, tenant: str) -> None:
        total, own = self._in_flight.total(), self._in_flight[tenant]
        if total >= self._limits.max_in_flight:
            reason = f"the router holds {total} requests, as many as it takes"
        elif tenant and own >= self._limits.tenant_in_flight:
            reason = f"the router holds {own} requests of this tenant, as many as it takes of one"
        else:
            return
        # Spread, so that those refused together do not come back together.
        raise OverloadedError(f"{reason}; retry later", retry_after_seconds=random.uniform(0.5, 1.5))

    def _count(self, tenant: str, change: int) -> None:
        self._in_flight[tenant] += change
        if not self._in_flight[tenant]:
            del self._in_flight[tenant]
        self._metrics.in_flight(self._in_flight.total())
