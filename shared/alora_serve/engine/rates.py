"""How fast a service has been lately, for routers and for deciding between fetching and computing.

Every figure is 0 before its first measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

ALONE_SHARE: Final = 1 / 2
"""Of the longest step's tokens, what a prompt that runs alone must have for its speed to count."""

BESIDE_SHARE: Final = 1 / 8
"""Likewise of one that runs beside sequences that decode, where it is given a quarter at most."""

LEAST_SHARE: Final = 1 / 4
"""Of such a step's time, what the prompt is taken to need at least: others may have been many more when they were
measured, and a long prompt runs hundreds of steps until they are again."""

_WEIGHT_OF_NEW = 0.1


@dataclass(slots=True)
class StepRates:
    """Running means. One writer; readers may be a step behind.

    Attributes:
        step_seconds: a step that only decodes.
        prefill_tokens_per_second: a prompt's tokens, by themselves or beside those who decode.
    """

    step_seconds: float = 0.0
    prefill_tokens_per_second: float = 0.0

    def observe(self, *, decoding: int, prompt_tokens: int, budget_tokens: int, seconds: float) -> None:
        """Account for a step. One of a little prompt says nothing: most of it is reading weights.

        Args:
            decoding: sequences that run one token.
            prompt_tokens: of all the others.
            budget_tokens: prompt tokens of the longest step.
            seconds: that it took.
        """
        if not prompt_tokens:
            self.step_seconds = _mean(self.step_seconds, seconds)
            return
        # Beside those who decode, a prompt takes what the step is longer for it; the weights are read for them anyway.
        others_seconds = min(self.step_seconds, seconds * (1 - LEAST_SHARE)) if decoding else 0.0
        if prompt_tokens >= budget_tokens * (BESIDE_SHARE if decoding else ALONE_SHARE):
            token_seconds = (seconds - others_seconds) / prompt_tokens
            self.prefill_tokens_per_second = _mean_rate(self.prefill_tokens_per_second, token_seconds)


@dataclass(slots=True)
class RecentMean:
    """Running mean of something that happens now and then. One writer."""

    value: float = 0.0

    def observe(self, value: float) -> None:
        """Account for one more."""
        self.value = _mean(self.value, value)


@dataclass(slots=True)
class RecentSpeed:
    """Amount a second over recent transfers: large ones count by their size, so the latency of small ones does not.

    One writer.
    """

    _amount: float = field(default=0.0, init=False)
    _seconds: float = field(default=0.0, init=False)

    @property
    def per_second(self) -> float:
        """Recent amount over the time it took."""
        return self._amount / self._seconds if self._seconds else 0.0

    def forget(self) -> None:
        """Begin anew: what was measured says nothing of what is."""
        self._amount = self._seconds = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        """Account for a transfer; one of nothing, or in no time, says nothing."""
        if amount > 0 and seconds > 0:
            self._amount = self._amount * (1 - _WEIGHT_OF_NEW) + amount
            self._seconds = self._seconds * (1 - _WEIGHT_OF_NEW) + seconds


@dataclass(slots=True)
class ServiceRates:
    """What requests tell about the process around the engine. Written on the event loop alone.

    Attributes:
        fetch_bytes: KV from the store, as fast as a request that waits for it sees it.
        sequence_seconds: a sequence from its place in the batch to its last token.
    """

    fetch_bytes: RecentSpeed = field(default_factory=RecentSpeed)
    sequence_seconds: RecentMean = field(default_factory=RecentMean)


def _mean(old: float, new: float) -> float:
    return new if not old else old + _WEIGHT_OF_NEW * (new - old)


def _mean_rate(old: float, new_seconds: float) -> float:
    """Mean of times, as a rate: one that came out near nothing would be a rate beyond all others."""
    seconds = _mean(1 / old if old else 0.0, new_seconds)
    return 1 / seconds if seconds else 0.0
