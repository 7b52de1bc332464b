"""What every compared system offers, so that a scenario drives all of them with the same prompts in the same words.

Prompts are token ids. A *prefix* is a conversation as far as base weights own it. Asked of an adapter, the prompt is
the prefix and that adapter's invocation; asked of the base model, the prefix itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self

from adapters import Adapter

from alora_serve.types import TokenIds


@dataclass(frozen=True, slots=True)
class Warmed:
    """What making a conversation's base KV cost: tokens computed, and seconds for them."""

    computed_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        tokens: generated.
        first_token_seconds: since this question was sent.
        total_seconds: the same, to the last token.
        notes: whatever else the system says of itself, in numbers (``fetched_bytes``, ``cached_tokens``).
    """

    tokens: TokenIds
    first_token_seconds: float
    total_seconds: float
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def token_seconds(self) -> float:
        """Mean time between two tokens."""
        return (self.total_seconds - self.first_token_seconds) / max(1, len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class FanOutAnswers:
    """All answers of one fan-out, in the adapters' order, and the seconds from its start to its last token.

    The answers' own seconds are since the fan-out's start, too, whether its questions were sent at once or in turn.
    """

    answers: tuple[Answer, ...]
    total_seconds: float


def in_turn(answers: Sequence[Answer]) -> FanOutAnswers:
    """A fan-out of questions that were sent one after another, each timed since it was sent."""
    timed: list[Answer] = []
    began = 0.0
    for answer in answers:
        first, total = began + answer.first_token_seconds, began + answer.total_seconds
        timed.append(replace(answer, first_token_seconds=first, total_seconds=total))
        began = total
    return FanOutAnswers(tuple(timed), began)


class System(Protocol):
    """One way of serving, while its ``async with`` block runs. One event loop.

    Attributes:
        name: as in tables.
        plain: its adapters are the plain LoRA twins, on from the first token.
    """

    name: str
    plain: bool

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Put a conversation's base KV where this system keeps it. Not part of what a fan-out is timed for."""

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        """Generate exactly ``max_tokens`` tokens greedily; None asks the base model."""

    async def fan_out(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> FanOutAnswers:
        """Ask every adapter about one conversation, the way this system is best asked."""


SystemContext = AbstractAsyncContextManager[System]


def reference_directory(system: System, adapter: Adapter | None) -> str | None:
    """Directory of the adapter that stock PEFT is compared with; None for the base model."""
    if adapter is None:
        return None
    return str(adapter.twin_directory if system.plain else adapter.directory)


def reference_prompt(prefix: TokenIds, adapter: Adapter | None) -> TokenIds:
    """What stock PEFT is given: a twin is asked with the tokens of the aLoRA."""
    return prefix if adapter is None else prefix + adapter.invocation
