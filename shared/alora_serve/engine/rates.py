"""How fast an engine has been lately, for routers and for deciding between fetching and computing."""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT_OF_NEW = 0.1


@dataclass(slots=True)
class StepRates:
    """Running means, 0 before the first measurement. One writer; readers may be a step behind.

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


def _mean(old: float, new: float) -> float:
    return new if not old else old + _WEIGHT_OF_NEW * (new - old)
