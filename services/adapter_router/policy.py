"""Which endpoint a request goes to: where its first token is predicted first. Pure: no I/O, no clock, no randomness.

Among endpoints whose predictions are as good as equal, the closest to the request's key in rendezvous order is taken:
noise does not scatter what belongs together, and endpoints that report no figures are picked by affinity alone.

Whatever is predicted, no endpoint gets more of this router's requests than its fair share of them times a factor. Only
they are counted, since only they are known exactly and at once: routers that bounded what reports say would all send to
the same endpoint until the next report.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from adapter_router.affinity import rendezvous_weight
from adapter_router.prediction import UNKNOWN_PACE, Pace, Prediction, predict, typical_pace
from alora_serve.kv.fingerprints import STRIDE_TOKENS
from alora_serve.types import AdapterInfo

TIE_RATIO: Final = 0.1
TIE_SECONDS: Final = 0.005
"""Predictions within a tenth of the best or within 5 ms of it are a tie: figures are means of noisy measurements, and
what other routers have sent is known up to a second late."""

Reason = Literal["prefix", "adapter", "load", "affinity", "fan_out", "only"]
"""Why an endpoint was picked: what the ones not taken would have spent most on (fetching or computing the ``prefix``,
loading the ``adapter``, waiting under their ``load``); rendezvous order among equals (``affinity``); others of its
``fan_out`` are there; no other may take it."""


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """What is known of one endpoint at the moment of picking.

    Attributes:
        address: ``host:port``, the endpoint's identity.
        healthy: its status stream is alive and no call found it unreachable since.
        draining: it finishes what it has and takes nothing new.
        in_flight: requests this router has on it, counted from the moment each was picked.
        model_digest: of its last report; empty while it has not reported.
        adapters: by name, from its last report; never guessed from traffic.
        reported_load: requests that its last report says it has, whoever sent them.
        in_flight_at_report: ``in_flight`` when that report came.
        places: sequences that fit its batch; 0 is unknown.
        pending_tokens: prompt tokens that it has to run, of its last report and of picks since.
        expected_tokens: of picks since its last report, by key: what only it can count, once it has tokenized them.
        pace: what it measured of itself.
        prefixes: fingerprints of what its memory holds, from its last report.
        coming_adapters: adapters of requests in flight there: in memory, or on their way.
        coming_prefixes: fingerprints of the same requests' prefixes.
    """

    address: str
    healthy: bool = True
    draining: bool = False
    in_flight: int = 0
    model_digest: bytes = b""
    adapters: Mapping[str, AdapterInfo] = field(default_factory=dict)
    reported_load: int = 0
    in_flight_at_report: int = 0
    places: int = 0
    pending_tokens: int = 0
    expected_tokens: Mapping[bytes, int] = field(default_factory=dict)
    pace: Pace = UNKNOWN_PACE
    prefixes: Collection[int] = frozenset()
    coming_adapters: Collection[str] = frozenset()
    coming_prefixes: Collection[int] = frozenset()

    @property
    def load(self) -> int:
        """Requests on it now: what it reported and how this router's own changed since; at least this router's own."""
        return max(self.in_flight, self.reported_load + self.in_flight - self.in_flight_at_report)

    def serves(self, adapter: str) -> bool:
        """It can run ``adapter``; the empty name is the base model, which every endpoint can run."""
        return not adapter or (adapter in self.adapters and not self.adapters[adapter].problem)

    def lacks_adapter(self, adapter: str) -> bool:
        """Its weights would have to be loaded first."""
        return bool(adapter) and adapter not in self.coming_adapters and not self.adapters[adapter].resident

    def tokens_ahead(self, key: bytes) -> int:
        """Prompt tokens that it has to run before those of a request, which shares what is expected under its key."""
        return self.pending_tokens + sum(self.expected_tokens.values()) - self.expected_tokens.get(key, 0)

    def resident_tokens(self, longest_first: Sequence[int]) -> int:
        """Tokens of a prefix that are in its memory or on their way there, as far as its fingerprints tell."""
        # A prefix is there up to some length and not beyond, so the longest that is there is found by halving.
        beyond = bisect_left(longest_first, True, key=self.prefixes.__contains__)
        if self.coming_prefixes:
            beyond = min(beyond, bisect_left(longest_first, True, key=self.coming_prefixes.__contains__))
        return STRIDE_TOKENS * (len(longest_first) - beyond)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs of an endpoint.

    Attributes:
        key: what it should stay close to; see :mod:`adapter_router.affinity`.
        model_digests: base models that will do.
        adapter: name of the adapter; empty is the base model.
        group_size: requests of one fan-out still to be placed, this one included. The load bound counts them all, so a
            fan-out fills few endpoints up to their fair share instead of one request on each.
        together: addresses that others of its fan-out were sent to; whoever sends a request adds to it. None: no other.
        fingerprints: of its prefix, shortest first; see :mod:`alora_serve.kv.fingerprints`.
        prefix_tokens: whose KV an endpoint may have, or fetch.
        computed_tokens: prompt tokens that no memory and no store can have the KV of.
        expected_tokens: prompt tokens that will probably have to be run, guessed before anybody tokenized them. What is
            sent after it waits for them; where they themselves would be quicker is not judged by a guess.
    """

    key: bytes
    model_digests: Collection[bytes]
    adapter: str = ""
    group_size: int = 1
    together: set[str] | None = None
    fingerprints: Sequence[int] = ()
    prefix_tokens: int = 0
    computed_tokens: int = 0
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Pick:
    """The endpoint that takes a request, why, and when its first token is due there; 0 when nothing is known."""

    address: str
    reason: Reason
    predicted_seconds: float = 0.0


def load_bound(total_in_flight: int, num_endpoints: int, load_factor: float, group_size: int = 1) -> int:
    """Most requests one endpoint may hold once ``group_size`` more are placed: the fair share times the factor."""
    return math.ceil(load_factor * (total_in_flight + group_size) / num_endpoints)


def eligible(endpoints: Iterable[EndpointSnapshot], demand: Demand) -> list[EndpointSnapshot]:
    """The endpoints that may take a request now, whatever their load."""
    return [
        endpoint
        for endpoint in endpoints
        if endpoint.healthy
        and not endpoint.draining
        and endpoint.model_digest in demand.model_digests
        and endpoint.serves(demand.adapter)
    ]


def pick(
    endpoints: Iterable[EndpointSnapshot], demand: Demand, *, load_factor: float, avoid: Collection[str] = ()
) -> Pick | None:
    """Where the next request goes, or None when no endpoint may take it.

    With ``load_factor`` >= 1 there always is an endpoint within the load bound: were all at it, they would hold more
    requests than there are.

    Args:
        endpoints: everything known.
        demand: what the request needs.
        load_factor: how far above its fair share an endpoint may be filled, >= 1.
        avoid: addresses that failed this request already.
    """
    candidates = [e for e in eligible(endpoints, demand) if e.address not in avoid]
    if not candidates:
        return None
    in_flight = sum(endpoint.in_flight for endpoint in candidates)
    bound = load_bound(in_flight, len(candidates), load_factor, demand.group_size)
    within = [endpoint for endpoint in candidates if endpoint.in_flight < bound]
    near = [endpoint for endpoint in within if endpoint.address in demand.together] if demand.together else []
    judged = near or _for_fewest(within, bound, demand.group_size)
    predictions = _predictions(judged, demand, _typical(candidates))
    totals = [sum(prediction) for prediction in predictions]
    limit = max(min(totals) * (1 + TIE_RATIO), min(totals) + TIE_SECONDS)
    weight = rendezvous_weight(demand.key)
    (_, address), chosen = max((weight(judged[i].address), i) for i, total in enumerate(totals) if total <= limit)
    if near:
        reason: Reason = "fan_out"
    elif len(candidates) == 1:
        reason = "only"
    elif worse := [p for p, total in zip(predictions, totals, strict=True) if total > limit]:
        reason = _largest_saving(predictions[chosen], worse)
    else:
        full = (endpoint.address for endpoint in candidates if endpoint.in_flight >= bound)
        reason = "load" if any(weight(other) > weight(address) for other in full) else "affinity"
    return Pick(address, reason, totals[chosen])


def _for_fewest(within: list[EndpointSnapshot], bound: int, group_size: int) -> list[EndpointSnapshot]:
    """Those with which ``group_size`` requests fit on as few endpoints as possible; for one request, all."""
    left = group_size
    for in_flight in sorted(endpoint.in_flight for endpoint in within) if group_size > 1 else ():
        if in_flight + left <= bound:
            break
        left -= bound - in_flight
    return [endpoint for endpoint in within if endpoint.in_flight + left <= bound]


def _typical(endpoints: list[EndpointSnapshot]) -> Pace:
    """What stands in for figures that some endpoint lacks."""
    paces = [endpoint.pace for endpoint in endpoints]
    return typical_pace(paces) if any(0.0 in pace for pace in paces) else UNKNOWN_PACE


def _predictions(endpoints: list[EndpointSnapshot], demand: Demand, typical: Pace) -> list[Prediction]:
    longest_first = demand.fingerprints[::-1]
    return [
        predict(
            endpoint.pace.filled(typical),
            load=endpoint.load,
            places=endpoint.places,
            pending_tokens=endpoint.tokens_ahead(demand.key),
            adapter_missing=endpoint.lacks_adapter(demand.adapter),
            missing_tokens=demand.prefix_tokens - endpoint.resident_tokens(longest_first),
            computed_tokens=demand.computed_tokens,
        )
        for endpoint in endpoints
    ]


def _largest_saving(chosen: Prediction, others: list[Prediction]) -> Reason:
    """What most of the time is spent on that the others would take longer."""
    columns = zip(*others, strict=True)
    queue, adapter, prompt = (sum(column) / len(others) - own for own, column in zip(chosen, columns, strict=True))
    largest = max(queue, adapter, prompt)
    return "prefix" if prompt == largest else "adapter" if adapter == largest else "load"
