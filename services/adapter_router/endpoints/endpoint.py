"""One endpoint of a service and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from grpc import aio

from adapter_router.policy import EndpointSnapshot
from alora_serve.types import AdapterInfo, EndpointStatus

StubT = TypeVar("StubT")

STATES: Final = ("healthy", "draining", "down")
"""What an endpoint may be, as metrics name it."""


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How a set of endpoints finds, judges and fills its members.

    Attributes:
        load_factor: see :func:`adapter_router.policy.pick`.
        resolve_seconds: pause between two look-ups of the targets.
        status_timeout_seconds: an endpoint silent for longer is unhealthy, though its connection may live.
        wait_seconds: longest wait of a request for an endpoint that may take it, so that one restart is not an error.
    """

    load_factor: float = 1.25
    resolve_seconds: float = 2.0
    status_timeout_seconds: float = 5.0
    wait_seconds: float = 2.0


class Endpoint(Generic[StubT]):
    """One address, its channel, and what is known of it. Changed only by the set it belongs to."""

    def __init__(self, address: str, channel: aio.Channel, stub: StubT) -> None:
        self.address = address
        self.channel = channel
        self.stub = stub
        self.status: EndpointStatus | None = None
        self.adapters: dict[str, AdapterInfo] = {}
        self.healthy = False
        self.in_flight = 0
        self.retired = False

    def snapshot(self) -> EndpointSnapshot:
        """What :func:`adapter_router.policy.pick` judges."""
        status = self.status
        if status is None:
            return EndpointSnapshot(self.address, healthy=False, in_flight=self.in_flight)
        return EndpointSnapshot(
            self.address,
            self.healthy,
            status.draining,
            self.in_flight,
            status.model.model_digest,
            self.adapters,
        )

    @property
    def state(self) -> str:
        """One of :data:`STATES`."""
        if not self.healthy or self.status is None:
            return "down"
        return "draining" if self.status.draining else "healthy"
