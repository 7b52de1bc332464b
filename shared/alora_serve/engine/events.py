"""What a sequence tells whoever submitted it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alora_serve.engine.answer import Ending
from alora_serve.errors import AloraServeError
from alora_serve.kv.keys import BlockChain
from alora_serve.model.kv_memory import Prefix
from alora_serve.types import Heartbeat, TokenChunk, TokenIds


@dataclass(frozen=True, slots=True)
class BaseComputed:
    """Base KV that a sequence computed is resident now. The receiver owns a pin on ``prefix`` and must release it.

    Comes whenever blocks are full, so that they are stored while the next ones are computed, and once more for the
    partial tail at the end.

    Attributes:
        chain: block names of the tokens.
        prefix: holds positions ``[0, end)``.
        start: first position computed here and not reported before.
        end: position after the last one.
    """

    chain: BlockChain
    prefix: Prefix
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokensScored:
    """Natural-log probabilities of the next given tokens of a sequence that scores (``engine/scoring.py``)."""

    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """What a sequence cost in the engine. Seconds since submission unless said otherwise."""

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    computed_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SequenceDone:
    """Last event of a sequence that ran to its end. ``ending`` is None for a prefill."""

    ending: Ending | None
    text: str
    generated: TokenIds
    stats: SequenceStats = SequenceStats()


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """Last event of a sequence that did not."""

    error: AloraServeError


SequenceEvent = TokenChunk | TokensScored | Heartbeat | BaseComputed | SequenceDone | SequenceFailed
Sink = Callable[[SequenceEvent], None]
"""Takes events on the engine's thread; must not block."""
