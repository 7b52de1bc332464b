"""What the steps of a pipeline found and cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from alora_serve.types import Usage


@dataclass(frozen=True, slots=True)
class Spent:
    """What a call cost. Seconds are the client's; tokens are as in :class:`~alora_serve.types.Usage`."""

    seconds: float
    prompt_tokens: int
    cached_tokens: int
    fetched_tokens: int
    computed_tokens: int
    generated_tokens: int

    @classmethod
    def of(cls, seconds: float, usages: Iterable[Usage]) -> Self:
        """The cost of a call whose answers used these."""
        counts = [
            (u.prompt_tokens, u.cached_tokens, u.fetched_tokens, u.computed_tokens, u.generated_tokens) for u in usages
        ]
        return cls(seconds, *(sum(column) for column in zip(*counts, strict=True)))


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a pipeline.

    Attributes:
        what: in words.
        intrinsics: that were asked, together; empty where the base model read or answered.
        found: what was answered, as people read it.
        recomputed: the same question asked of plain LoRA twins, which share no KV; None where that was not measured.
    """

    what: str
    intrinsics: tuple[str, ...]
    found: str
    spent: Spent
    recomputed: Spent | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A pipeline from its first step to its last."""

    steps: tuple[Step, ...]

    @property
    def compared(self) -> tuple[tuple[Spent, Spent], ...]:
        """Of each step that was measured both ways: what it cost, and what its plain LoRA twins did."""
        return tuple((step.spent, step.recomputed) for step in self.steps if step.recomputed is not None)
