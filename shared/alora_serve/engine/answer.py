"""An answer as it grows: its text, the form it is bound to, and where it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from alora_serve.model.structure.constraint import Constraint
from alora_serve.model.text import TextStream
from alora_serve.types import FinishReason, TokenIds, TokenLogprob


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer is over. ``stop_string`` is the one that ended it, if one did."""

    reason: FinishReason
    stop_string: str = ""


@dataclass(slots=True)
class Answer:
    """A function of its tokens, taken one by one. One thread at a time.

    Attributes:
        text: turns tokens into text and finds stop strings.
        max_tokens: where it ends at the latest.
        end_ids: tokens that end it, where no form says where they do.
        constraint: the form that it must have, and where its own end ids end it; None leaves it free.
        token_bytes: spells a token, where log-probabilities are told; None tells them without bytes.
    """

    text: TextStream
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    token_bytes: Callable[[int], bytes] | None = None
    _num_tokens: int = field(init=False, default=0)

    def restore(self, token_ids: TokenIds) -> Ending | None:
        """Take the tokens of an attempt before this one, whose text is known; the ending, if they have come to it.

        Raises:
            InvalidRequestError: they do not have the form of the answer.
        """
        if self.constraint is not None:
            self.constraint.restore(token_ids)
        self._num_tokens = len(token_ids)
        restored = self.text.restore(self._spoken(token_ids))
        return self._ending(token_ids[-1], restored.stop_string) if token_ids else None

    def push(self, token_id: int) -> tuple[str, Ending | None]:
        """Take the next token; the text that is now certain, and the ending, if this is the last one.

        Raises:
            AloraServeError: the form of the answer cannot be followed.
        """
        self._num_tokens += 1
        if self.constraint is not None:
            self.constraint.push(token_id)
        delta = self.text.push(self._spoken((token_id,)))
        return delta.text, self._ending(token_id, delta.stop_string)

    def spell(self, token_id: int) -> bytes:
        """Bytes of a token; empty where nobody asks for them."""
        return self.token_bytes(token_id) if self.token_bytes is not None else b""

    def likely(self, tokens: tuple[tuple[int, float], ...]) -> tuple[TokenLogprob, ...]:
        """Tokens and their log-probabilities, spelt."""
        return tuple(TokenLogprob(token_id, logprob, self.spell(token_id)) for token_id, logprob in tokens)

    def _spoken(self, token_ids: TokenIds) -> TokenIds:
        """Those of the tokens just taken that are text: what ends a form would not have it."""
        return token_ids[:-1] if self.constraint is not None and self.constraint.has_ended else token_ids

    def _ending(self, last: int, stop_string: str | None) -> Ending | None:
        if stop_string is not None:
            return Ending(FinishReason.STOP, stop_string)
        if last in self.end_ids if self.constraint is None else self.constraint.is_complete:
            return Ending(FinishReason.STOP)
        return Ending(FinishReason.LENGTH) if self._num_tokens >= self.max_tokens else None
