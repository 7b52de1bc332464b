"""Answers of ``POST /v1/completions``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from alora_serve.client import Finished, StreamEvent
from openai_front.answers import Head, Json, details, finish_reason, logprob, usage
from openai_front.completion_request import CompletionRequest
from openai_front.generations import Answer, Question


class CompletionWriter:
    """See :class:`openai_front.answers.AnswerWriter`."""

    def __init__(self, head: Head, request: CompletionRequest, question: Question) -> None:
        self._head = head
        self._request = request
        self._question = question
        self._usage = {"usage": None} if request.wants_usage else {}
        self._num_tokens = [0] * question.num_choices
        self._offsets = [0] * question.num_choices

    def whole(self, answers: Sequence[Answer]) -> Json:
        """One object with all choices."""
        choices = [
            self._choice(index, answer, answer.text, finish_reason(answer)) for index, answer in enumerate(answers)
        ]
        return self._object(choices) | self._costs(answers)

    def chunks(self, index: int, answer: Answer, event: StreamEvent, text: str) -> list[Json]:
        """What is new, and at the end why it ended."""
        reason = finish_reason(answer) if isinstance(event, Finished) else None
        choice = self._choice(index, answer, text, reason)
        is_news = text or reason or (choice["logprobs"] and choice["logprobs"]["tokens"])
        return [self._object([choice]) | self._usage] if is_news else []

    def last_chunk(self, answers: Sequence[Answer]) -> Json:
        """No choice, and what all of them cost."""
        return self._object([]) | self._costs(answers)

    def _object(self, choices: Sequence[Json]) -> dict[str, Any]:
        return {**self._head.of("cmpl", "text_completion"), "choices": list(choices)}

    def _costs(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {"usage": usage(self._question, answers), "alora": details(self._question, answers)}

    def _choice(self, index: int, answer: Answer, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, answer), "finish_reason": reason}

    def _logprobs(self, index: int, answer: Answer) -> dict[str, Any] | None:
        """Those of the tokens that were not told yet, in the older form: lists beside each other."""
        if self._request.logprobs is None:
            return None
        first, self._num_tokens[index] = self._num_tokens[index], len(answer.tokens)
        tokens, likely = answer.tokens[first:], answer.top_logprobs[first:]
        ends = list(itertools.accumulate((len(token.text) for token in tokens), initial=self._offsets[index]))
        self._offsets[index] = ends[-1]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [logprob(token) for token in tokens],
            # Of two tokens that look the same, the likelier comes first and stays.
            "top_logprobs": [{each.text: logprob(each) for each in reversed(place)} for place in likely] or None,
            "text_offset": ends[:-1],
        }
