"""The ways of routing that the simulation compares: the router's own code, simpler ones, and what cannot be built."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from routing_traffic import Request
from routing_worker import Worker

from adapter_router.endpoints.endpoint import Endpoint
from adapter_router.policy import pick
from alora_serve.types import AdapterDigest, AdapterInfo, EndpointStatus

LOAD_FACTOR = 1.25


class Router(Protocol):
    """One replica of a router."""

    def choose(self, request: Request, now: float) -> int:
        """Which worker takes the request. Counted as sent."""

    def ended(self, request: Request, worker: int) -> None:
        """A request that this replica sent is done."""

    def report(self, worker: int, status: EndpointStatus, resident: frozenset[str]) -> None:
        """What a worker says about itself, and which adapters it holds."""


class RoundRobin:
    """Each worker in its turn."""

    def __init__(self, workers: Sequence[Worker], rng: random.Random) -> None:
        self._workers = len(workers)
        self._next = rng.randrange(self._workers)

    def choose(self, request: Request, now: float) -> int:
        """The next one."""
        self._next = (self._next + 1) % self._workers
        return self._next

    def ended(self, request: Request, worker: int) -> None:
        """Nothing is counted."""

    def report(self, worker: int, status: EndpointStatus, resident: frozenset[str]) -> None:
        """Nothing is known."""


class LeastInFlight:
    """The worker that has fewest of this replica's own requests; of equals, any."""

    def __init__(self, workers: Sequence[Worker], rng: random.Random) -> None:
        self._in_flight = [0] * len(workers)
        self._rng = rng

    def choose(self, request: Request, now: float) -> int:
        """The emptiest."""
        fewest = min(self._in_flight)
        chosen = self._rng.choice([worker for worker, count in enumerate(self._in_flight) if count == fewest])
        self._in_flight[chosen] += 1
        return chosen

    def ended(self, request: Request, worker: int) -> None:
        """One fewer."""
        self._in_flight[worker] -= 1

    def report(self, worker: int, status: EndpointStatus, resident: frozenset[str]) -> None:
        """Nothing is known."""


class Predicted:
    """The router's own policy and its own bookkeeping."""

    def __init__(self, workers: Sequence[Worker], rng: random.Random) -> None:
        # No channels: what an endpoint knows needs none.
        self.endpoints = [
            Endpoint(f"10.0.{number >> 8}.{number & 255}:50051", cast("Any", None), None)
            for number in range(len(workers))
        ]
        self._numbers = {endpoint.address: number for number, endpoint in enumerate(self.endpoints)}

    def choose(self, request: Request, now: float) -> int:
        """As :meth:`adapter_router.endpoints.pool.EndpointSet.lease` does."""
        demand = request.demand
        choice = pick((e.snapshot() for e in self.endpoints), demand, load_factor=LOAD_FACTOR)
        if choice is None:
            raise RuntimeError("every simulated worker is fit, yet none was picked")
        chosen = self._numbers[choice.address]
        self.endpoints[chosen].take(demand)
        if demand.together is not None:
            demand.together.add(choice.address)
        return chosen

    def ended(self, request: Request, worker: int) -> None:
        """As the end of a lease."""
        self.endpoints[worker].give_back(request.demand)

    def report(self, worker: int, status: EndpointStatus, resident: frozenset[str]) -> None:
        """As a status stream's message."""
        self.endpoints[worker].report(status)
        self.endpoints[worker].adapters = cast("dict[str, AdapterInfo]", Catalogue(resident))


class Affinity(Predicted):
    """Rendezvous hashing with bounded load: what the router's policy is while workers report no figures."""

    def report(self, worker: int, status: EndpointStatus, resident: frozenset[str]) -> None:
        """Only that it is there."""
        super().report(worker, EndpointStatus(status.model), resident)


class Oracle:
    """Knows every worker's true state at every moment, and takes the one whose first token would come first."""

    def __init__(self, workers: Sequence[Worker], rng: random.Random) -> None:
        self._workers = workers

    def choose(self, request: Request, now: float) -> int:
        """The best for this request alone; of equals, the emptiest."""
        return min(
            range(len(self._workers)),
            key=lambda w: (self._workers[w].first_token(request, now), self._workers[w].on_it),
        )

    def ended(self, request: Request, worker: int) -> None:
        """It looks at the workers themselves."""

    def report(self, worker: int, status: EndpointStatus, resident: frozenset[str]) -> None:
        """It looks at the workers themselves."""


@dataclass(frozen=True)
class Catalogue(Mapping[str, AdapterInfo]):
    """Every adapter, by name, of which some are resident: a list of thousands that takes no time to make."""

    resident: frozenset[str]

    def __getitem__(self, name: str) -> AdapterInfo:
        """One adapter."""
        return _RESIDENT if name in self.resident else _LISTED

    def __contains__(self, name: object) -> bool:
        """All are known."""
        return True

    def __iter__(self) -> Iterator[str]:
        """Those that are worth naming."""
        return iter(self.resident)

    def __len__(self) -> int:
        """How many those are."""
        return len(self.resident)


_LISTED = AdapterInfo("a", AdapterDigest("0" * 64), "alora", 32, ("q_proj",), (1,), "x", 1 << 20, resident=False)
_RESIDENT = replace(_LISTED, resident=True)

POLICIES: dict[str, type[RoundRobin | LeastInFlight | Predicted | Affinity | Oracle]] = {
    "predicted": Predicted,
    "rendezvous": Affinity,
    "least in flight": LeastInFlight,
    "round robin": RoundRobin,
    "oracle": Oracle,
}
"""By the name that results carry; the first is the router's."""
