"""One endpoint of a service and what is known of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar, get_args

from grpc import aio

from adapter_router.policy import Demand, EndpointSnapshot
from adapter_router.prediction import Pace
from alora_serve.kv.fingerprints import STRIDE_TOKENS
from alora_serve.metrics import EndpointState
from alora_serve.rpc.watch import adapters_by_name
from alora_serve.types import AdapterInfo, EndpointStatus

StubT = TypeVar("StubT")

STATES: Final[tuple[EndpointState, ...]] = get_args(EndpointState)
"""What an endpoint may be, as metrics name it."""


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How a set of endpoints finds, judges and fills its members.

    Attributes:
        load_factor: see :func:`adapter_router.policy.pick`.
        resolve_seconds: pause between two look-ups of the targets.
        silence_seconds: an endpoint silent for longer is lost, though its connection may live: it reports every second.
        wait_seconds: longest wait of a request for an endpoint that may take it, so that one restart is not an error.
    """

    load_factor: float = 1.25
    resolve_seconds: float = 2.0
    silence_seconds: float = 3.0
    wait_seconds: float = 2.0


class Endpoint(Generic[StubT]):
    """One address, its channel, and what is known of it. Changed only by the set it belongs to."""

    def __init__(self, address: str, channel: aio.Channel, stub: StubT) -> None:
        self.address = address
        self.channel = channel
        self.stub = stub
        self.status: EndpointStatus | None = None
        self.adapters: dict[str, AdapterInfo] = {}
        self.in_flight = 0
        self.retired = False
        self.silent = asyncio.Event()
        """Set while it has said nothing for too long: it hangs, or is cut off. What was asked of it is lost."""
        self._healthy = False
        self._pace = Pace()
        self._in_flight_at_report = 0
        # What requests in flight bring into its memory, until a report after their end has told of it.
        self._coming_adapters: Counter[str] = Counter()
        self._coming_prefixes: Counter[int] = Counter()
        self._ended: list[Demand] = []
        self._unreported: list[Demand] = []
        self._snapshot: EndpointSnapshot | None = None

    @property
    def healthy(self) -> bool:
        """It may be picked as far as health goes."""
        return self._healthy

    @healthy.setter
    def healthy(self, healthy: bool) -> None:
        self._healthy, self._snapshot = healthy, None

    def succeed(self, before: Endpoint[StubT]) -> None:
        """Take for true what the same address said over an earlier connection, until it speaks over this one."""
        if before.status is not None:
            self.report(before.status)
            self.healthy = before.healthy

    @property
    def state(self) -> EndpointState:
        """As metrics name it."""
        if not self.healthy or self.status is None:
            return "down"
        return "draining" if self.status.draining else "healthy"

    def snapshot(self) -> EndpointSnapshot:
        """What :func:`adapter_router.policy.pick` judges. Asked for at every pick, so made anew only after a change."""
        if self._snapshot is None:
            self._snapshot = self._take_snapshot()
        return self._snapshot

    def take(self, demand: Demand) -> None:
        """Count a request that was just sent here, before anything else is picked."""
        self.in_flight += 1
        self._coming_adapters[demand.adapter] += 1
        self._coming_prefixes.update(demand.fingerprints)
        self._unreported.append(demand)
        self._snapshot = None

    def give_back(self, demand: Demand) -> None:
        """A request that was sent here has ended."""
        self.in_flight -= 1
        self._ended.append(demand)
        self._unreported = [sent for sent in self._unreported if sent is not demand]
        self._snapshot = None

    def report(self, status: EndpointStatus) -> bool:
        """Take in what it says about itself; True when that changes which requests it may take."""
        before = self.status
        changed = not self.healthy or before is None or _role(before) != _role(status)
        if before is None or before.adapters != status.adapters:
            self.adapters = adapters_by_name(status.adapters)
        self.status, self.healthy = status, True
        self.silent.clear()
        self._pace = Pace.of(status)
        self._in_flight_at_report = self.in_flight
        self._unreported.clear()
        for demand in self._ended:
            self._coming_adapters -= Counter([demand.adapter])
            self._coming_prefixes.subtract(demand.fingerprints)
        if self._ended:
            self._coming_prefixes = +self._coming_prefixes
        self._ended.clear()
        return changed

    def _take_snapshot(self) -> EndpointSnapshot:
        status = self.status
        if status is None:
            return EndpointSnapshot(self.address, healthy=False, in_flight=self.in_flight)
        digest = status.resident_prefixes
        return EndpointSnapshot(
            self.address,
            self.healthy,
            status.draining,
            self.in_flight,
            status.model.model_digest,
            self.adapters,
            reported_load=status.running + status.queued,
            in_flight_at_report=self._in_flight_at_report,
            places=status.max_running,
            pending_tokens=status.pending_prefill_tokens + sum(sent.computed_tokens for sent in self._unreported),
            expected_tokens=_expected_tokens(self._unreported),
            pace=self._pace,
            prefixes=digest.fingerprints if digest.stride_tokens == STRIDE_TOKENS else frozenset(),
            coming_adapters=self._coming_adapters.keys(),
            coming_prefixes=self._coming_prefixes.keys(),
        )


def _expected_tokens(sent: Iterable[Demand]) -> dict[bytes, int]:
    """By key; those of one conversation are run once."""
    expected: dict[bytes, int] = {}
    for demand in sent:
        if demand.expected_tokens:
            expected[demand.key] = max(demand.expected_tokens, expected.get(demand.key, 0))
    return expected


def _role(status: EndpointStatus) -> tuple[object, ...]:
    """What decides which requests it may take, and what people are told of it; not how busy it is."""
    return status.model, status.draining, status.adapters
