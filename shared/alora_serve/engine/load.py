"""How busy an engine is, as those outside it see it."""

from __future__ import annotations

from collections.abc import Iterable
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


def prefill_tokens(sequences: Iterable[Sequence]) -> int:
    """Prompt tokens to run; approximate while the engine does."""
    # One pending token is a decode step.
    return sum(count for sequence in sequences if (count := sequence.pending_tokens) > 1)


def adapters_of(sequences: Listed[Sequence]) -> tuple[str, ...]:
    """Names of the adapters of these sequences, sorted."""
    adapters = [sequence.request.adapter for sequence in sequences]
    return tuple(sorted({adapter.info.name for adapter in adapters if adapter is not None}))
