"""What both kinds of completions answer alike: who answered, what it cost, how likely its tokens were."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from alora_serve.client import ModelInfo, StreamEvent
from alora_serve.types import TokenLogprob
from openai_front.generations import Answer, Question

Json = Mapping[str, Any]

NO_LOGPROB: Final = -9999.0
"""OpenAI's number for the logarithm of nothing, which JSON cannot write."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer begins with.

    Attributes:
        answer_id: without its prefix.
        created: Unix time.
        model: as the request names it.
        base: the base model.
    """

    answer_id: str
    created: int
    model: str
    base: ModelInfo

    def of(self, prefix: str, kind: str) -> dict[str, Any]:
        """The common fields of an object of that kind."""
        return {
            "id": f"{prefix}-{self.answer_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.base.model_digest.hex()[:12]}",
        }


class AnswerWriter(Protocol):
    """Writes one request's answers as objects of OpenAI's API. Belongs to one request."""

    def whole(self, answers: Sequence[Answer]) -> Json:
        """The one object of an answer that is not streamed."""

    def chunks(self, index: int, answer: Answer, event: StreamEvent, text: str) -> list[Json]:
        """What a stream says of an event that added ``text`` to choice ``index``."""

    def last_chunk(self, answers: Sequence[Answer]) -> Json:
        """The object that ends a stream with what it cost."""


def usage(question: Question, answers: Sequence[Answer]) -> Json:
    """Tokens, as OpenAI counts them: each prompt once, all answers."""
    firsts = [answer.finished for answer in answers[:: question.samples] if answer.finished]
    prompt_tokens = sum(finished.usage.prompt_tokens for finished in firsts)
    generated = sum(answer.finished.usage.generated_tokens for answer in answers if answer.finished)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(finished.usage.cached_tokens for finished in firsts)},
    }


def details(question: Question, answers: Sequence[Answer]) -> list[Json]:
    """What OpenAI's API has no field for: for each choice the seed, and where tokens came from and time went."""
    return [
        {
            "index": index,
            "adapter": question.adapter or None,
            "adapter_digest": answer.started.adapter_digest if answer.started else "",
            "seed": answer.started.seed if answer.started else None,
            "stop_string": answer.finished.stop_string if answer.finished else "",
            "usage": dataclasses.asdict(answer.finished.usage) if answer.finished else None,
            "timings": dataclasses.asdict(answer.finished.timings) if answer.finished else None,
        }
        for index, answer in enumerate(answers)
    ]


def finish_reason(answer: Answer) -> str:
    """``stop`` or ``length``."""
    return "length" if answer.is_cut else "stop"


def chosen(token: TokenLogprob, likely: Sequence[TokenLogprob]) -> Json:
    """A token, and those that might have stood in its place."""
    return {**_token(token), "top_logprobs": [_token(each) for each in likely]}


def logprob(token: TokenLogprob) -> float:
    """As JSON can write it."""
    return token.logprob if math.isfinite(token.logprob) else NO_LOGPROB


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob(token), "bytes": list(token.token_bytes)}
