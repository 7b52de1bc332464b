"""What an intrinsic's adapter answered: its text, how likely each token was, and the sentences that it may cite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from alora_serve.errors import IntrinsicOutputError
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.intrinsics.json_paths import Json
from alora_serve.intrinsics.sentences import TaggedSentence


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One generated token.

    Attributes:
        content: the bytes that it adds to the text.
        logprob: its natural-log probability.
        alternatives: bytes and log-probability of the most likely tokens in its place, itself among them or not.
    """

    content: bytes
    logprob: float
    alternatives: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An adapter's whole answer.

    Attributes:
        text: JSON.
        tokens: in order, from the text's beginning; empty where nothing weighs them.
        sentences: by source, by number, those that the conversation was tagged with.
    """

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    sentences: Mapping[str, Mapping[int, TaggedSentence]] = field(default_factory=dict)

    def parsed(self) -> Json:
        """The answer as a JSON value.

        Raises:
            IntrinsicOutputError: it is none.
        """
        try:
            return json.loads(self.text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise IntrinsicOutputError(f"the answer is not JSON ({error}): {excerpt(self.text)}") from error

    def token_at(self, position: int) -> tuple[ScoredToken, int]:
        """The token that holds the character at ``position``, and how many of its bytes stand before it.

        Raises:
            IntrinsicOutputError: the tokens do not reach that far.
        """
        wanted = len(self.text[:position].encode())
        ends = accumulate(len(token.content) for token in self.tokens)
        for token, end in zip(self.tokens, ends, strict=True):
            if wanted < end:
                return token, wanted - (end - len(token.content))
        raise IntrinsicOutputError(
            f"no log-probabilities were reported for character {position} of {excerpt(self.text)}"
        )


def _refuse(constant: str) -> Json:
    raise ValueError(f"{constant} is no JSON")
