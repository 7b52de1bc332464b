"""How long an endpoint would take to a request's first token, from what it measured about itself. Pure.

::

    queue     step x (1 + load / BATCH_DOUBLING)  +  prompt tokens ahead  +  the wait for a place in a full batch
    adapter   0 if its weights are in memory or on their way there, else the measured time of a load
    prompt    min(missing prefix fetched, missing prefix computed)  +  what no store can have, computed

A figure that an endpoint has not measured yet is taken to be like that of the others, so that a new endpoint neither
starves nor attracts everything; one that nobody knows counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from alora_serve.types import EndpointStatus

BATCH_DOUBLING: Final = 16
"""Sequences beside it that make a sequence's step twice as long. An idle and a crowded endpoint must differ even while
their figures do not yet; a step of 16 sequences on one prefix takes up to twice that of one."""


class Pace(NamedTuple):
    """What an endpoint measured of itself, in seconds; 0 is unknown.

    Attributes:
        step_seconds: a decode step.
        sequence_seconds: a sequence in the batch, from its place to its last token.
        adapter_load_seconds: reading an adapter's weights.
        compute_token_seconds: running one prompt token.
        fetch_token_seconds: fetching one token's KV from the store.
    """

    step_seconds: float = 0.0
    sequence_seconds: float = 0.0
    adapter_load_seconds: float = 0.0
    compute_token_seconds: float = 0.0
    fetch_token_seconds: float = 0.0

    @classmethod
    def of(cls, status: EndpointStatus) -> Pace:
        """The figures of a report."""
        prefill, fetch = status.prefill_tokens_per_second, status.fetch_bytes_per_second
        return cls(
            status.step_seconds,
            status.sequence_seconds,
            status.adapter_load_seconds,
            1 / prefill if prefill else 0.0,
            status.model.kv_bytes_per_token / fetch if fetch else 0.0,
        )

    def filled(self, typical: Pace) -> Pace:
        """With the typical figure in place of each unknown one."""
        return self if 0.0 not in self else Pace(*(own or other for own, other in zip(self, typical, strict=True)))


UNKNOWN_PACE: Final = Pace()


class Prediction(NamedTuple):
    """Seconds to the first token, by what they are spent on; their sum is the prediction."""

    queue_seconds: float
    adapter_seconds: float
    prompt_seconds: float


def typical_pace(paces: Sequence[Pace]) -> Pace:
    """The mean of each figure over those who know it; 0 where nobody does."""
    columns = ([value for value in column if value] for column in zip(*paces, strict=True))
    return Pace(*(sum(known) / len(known) if known else 0.0 for known in columns))


def predict(
    pace: Pace,
    *,
    load: int,
    places: int,
    pending_tokens: int,
    adapter_missing: bool,
    missing_tokens: int,
    computed_tokens: int,
) -> Prediction:
    """What a request that comes now would wait for. Never falls when an argument or a figure grows, but for ``places``.

    Args:
        pace: of the endpoint, unknown figures filled.
        load: requests on it.
        places: sequences that fit its batch; 0 is unknown, taken as enough.
        pending_tokens: prompt tokens it has to run for others first.
        adapter_missing: the request's adapter is neither in memory nor on its way there.
        missing_tokens: tokens of the request's prefix whose KV it lacks and the store may have.
        computed_tokens: prompt tokens that must be computed wherever the request goes.
    """
    compute, fetch = pace.compute_token_seconds, pace.fetch_token_seconds
    queue = pace.step_seconds * (1 + load / BATCH_DOUBLING) + pending_tokens * compute
    if places and load >= places:
        queue += (load + 1 - places) / places * pace.sequence_seconds
    obtain = fetch if fetch and (fetch < compute or not compute) else compute
    return Prediction(
        queue,
        pace.adapter_load_seconds if adapter_missing else 0.0,
        missing_tokens * obtain + computed_tokens * compute,
    )
