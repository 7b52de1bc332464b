"""How fast a service has been lately, for routers and for deciding between fetching and computing.

Every figure is 0 before its first measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_WEIGHT_OF_NEW = 0.1


@dataclass(slots=True)
class StepRates:
    """Running means. One writer; readers may be a step behind.

    Attributes:
        step_seconds: a step that only decodes.
        prefill_tokens_per_second: a step that is mostly prompt.
    """

    step_seconds: float = 0.0
    prefill_tokens_per_second: float = 0.0

    def observe(self, *, sequences: int, tokens: int, budget_tokens: int, seconds: float) -> None:
        """Account for a step. Steps that mix decoding with a little prompt say nothing about either."""
        if tokens == sequences:
            self.step_seconds = _mean(self.step_seconds, seconds)
        elif tokens >= budget_tokens // 2:
            self.prefill_tokens_per_second = _mean(self.prefill_tokens_per_second, tokens / seconds)


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
