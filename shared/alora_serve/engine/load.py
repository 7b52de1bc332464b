"""How busy an engine is, as those outside it see it."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass

from alora_serve.engine.rates import StepRates
from alora_serve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot for those who spread requests.

    Attributes:
        running: sequences in the batch.
        waiting: sequences without a place.
        requests: places taken in batch and queue.
        pending_prefill_tokens: prompt tokens to run.
        tail_bytes: private KV of the sequences.
        running_adapters: of sequences in the batch, sorted.
        waiting_adapters: of those without a place.
        rates: recent speed.
    """

    running: int
    waiting: int
    requests: int
    pending_prefill_tokens: int
    tail_bytes: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    rates: StepRates

    @classmethod
    def of(
        cls, running: Listed[Sequence], waiting: Listed[Sequence], *, requests: int, tail_bytes: int, rates: StepRates
    ) -> EngineLoad:
        """Of an engine with these sequences; approximate while it runs them."""
        # One pending token is a decode step.
        pending = [count for sequence in (*running, *waiting) if (count := sequence.pending_tokens) > 1]
        return cls(
            running=len(running),
            waiting=len(waiting),
            requests=requests,
            pending_prefill_tokens=sum(pending),
            tail_bytes=tail_bytes,
            running_adapters=_adapters_of(running),
            waiting_adapters=_adapters_of(waiting),
            rates=rates,
        )


def _adapters_of(sequences: Listed[Sequence]) -> tuple[str, ...]:
    """Their names, sorted."""
    adapters = [sequence.request.adapter for sequence in sequences]
    return tuple(sorted({adapter.info.name for adapter in adapters if adapter is not None}))
