"""What a sequence tells whoever submitted it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alora_serve.errors import AloraServeError
from alora_serve.kv.keys import BlockChain
from alora_serve.model.kv_memory import Prefix
from alora_serve.types import FinishReason, Heartbeat, TokenChunk, TokenIds


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
class SequenceStats:
    """What a sequence cost in the engine. Seconds since submission unless said otherwise."""

    queue_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    computed_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceDone:
    """Last event of a sequence that ran to its end. ``finish_reason`` is None for a prefill."""

    finish_reason: FinishReason | None
    text: str
    stop_string: str
    generated: TokenIds
    stats: SequenceStats


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """Last event of a sequence that did not."""

    error: AloraServeError


SequenceEvent = TokenChunk | Heartbeat | BaseComputed | SequenceDone | SequenceFailed
Sink = Callable[[SequenceEvent], None]
"""Takes events on the engine's thread; must not block."""
