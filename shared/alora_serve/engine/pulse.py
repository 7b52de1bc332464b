"""Whether an engine's loop still turns: tells one that hangs from one that is slow, or has nothing to do."""

from __future__ import annotations

from time import monotonic
from typing import Final

from alora_serve.engine.rates import StepRates

LEAST_SECONDS: Final = 10.0
"""No loop is given up sooner: a machine may be busy with something else."""

TIMES_EXPECTED: Final = 10.0
"""How much longer than the longest step should take."""


class Pulse:
    """Written by the engine's thread at each turn of its loop; read by any.

    Args:
        rates: how fast steps have been; a service measures its prefill before the first.
        step_tokens: the longest prompt part that one step runs.
    """

    def __init__(self, rates: StepRates, step_tokens: int) -> None:
        self._rates = rates
        self._step_tokens = step_tokens
        self._turned_at: float | None = None

    def turn(self) -> None:
        """The loop turns now, and has something to do."""
        self._turned_at = monotonic()

    def rest(self) -> None:
        """There is nothing to do, so that no turn is due."""
        self._turned_at = None

    @property
    def is_lost(self) -> bool:
        """There is something to do, and for longer than any step can be expected to take the loop has not turned."""
        return self.lost_seconds > 0

    @property
    def lost_seconds(self) -> float:
        """For how long that has been so; 0 where it is not."""
        turned_at = self._turned_at
        if turned_at is None:
            return 0.0
        return max(0.0, monotonic() - turned_at - max(LEAST_SECONDS, TIMES_EXPECTED * self.longest_step_seconds))

    @property
    def longest_step_seconds(self) -> float:
        """What the longest step should take, as steps have been lately; 0 before the first was measured."""
        speed = self._rates.prefill_tokens_per_second
        return self._step_tokens / speed if speed else 0.0
