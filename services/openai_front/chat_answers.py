"""Answers of ``POST /v1/chat/completions``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from alora_serve.client import Finished, Started, StreamEvent, TokenChunk
from openai_front.answers import Head, Json, chosen, details, finish_reason, usage
from openai_front.chat_request import ChatRequest
from openai_front.forms import NamedTool
from openai_front.generations import Answer, Question
from openai_front.tool_calls import Call, ForcedCallReader, ToolCallReader


class CallReader(Protocol):
    """Tells calls from text while an answer grows."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text that is certain now, and the calls that are whole."""

    def finish(self) -> tuple[str, list[Call]]:
        """The rest, now that nothing follows."""


class ChatWriter:
    """See :class:`openai_front.answers.AnswerWriter`."""

    def __init__(self, head: Head, request: ChatRequest, question: Question) -> None:
        self._head = head
        self._request = request
        self._question = question
        self._usage = {"usage": None} if request.wants_usage else {}
        self._readers = [_reader(request) for _ in range(question.num_choices)]
        self._num_calls = [0] * question.num_choices
        self._num_tokens = [0] * question.num_choices

    def whole(self, answers: Sequence[Answer]) -> Json:
        """One object with all choices."""
        return {
            **self._head.of("chatcmpl", "chat.completion"),
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": usage(self._question, answers),
            "alora": details(self._question, answers),
        }

    def chunks(self, index: int, answer: Answer, event: StreamEvent, text: str) -> list[Json]:
        """The role first, then what is new, then why it ended."""
        match event:
            case Started():
                return [self._chunk(index, {"role": "assistant", "content": ""})]
            case TokenChunk() | Finished():
                chunks = self._news(index, answer, *self._read(index, text))
            case _:
                return []
        if isinstance(event, Finished):
            chunks += self._news(index, answer, *self._rest(index))
            chunks.append(self._chunk(index, {}, finish_reason=self._reason(index, answer)))
        return chunks

    def last_chunk(self, answers: Sequence[Answer]) -> Json:
        """No choice, and what all of them cost."""
        return {
            **self._head.of("chatcmpl", "chat.completion.chunk"),
            "choices": [],
            "usage": usage(self._question, answers),
            "alora": details(self._question, answers),
        }

    def _choice(self, index: int, answer: Answer) -> Json:
        text, calls = self._read(index, answer.text)
        rest, more = self._rest(index)
        text, calls = text + rest, calls + more
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [self._call(index, call) for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(index, answer),
            "finish_reason": self._reason(index, answer),
        }

    def _news(self, index: int, answer: Answer, text: str, calls: Sequence[Call]) -> list[Json]:
        logprobs = self._logprobs(index, answer)
        chunks = []
        if text or (logprobs and logprobs["content"]):
            chunks.append(self._chunk(index, {"content": text}, logprobs=logprobs))
        for call in calls:
            at = self._num_calls[index]
            chunks.append(self._chunk(index, {"tool_calls": [{"index": at, **self._call(index, call)}]}))
        return chunks

    def _chunk(self, index: int, delta: Json, **more: Any) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**self._head.of("chatcmpl", "chat.completion.chunk"), "choices": [choice], **self._usage}

    def _read(self, index: int, text: str) -> tuple[str, list[Call]]:
        reader = self._readers[index]
        return (text, []) if reader is None else reader.push(text)

    def _rest(self, index: int) -> tuple[str, list[Call]]:
        reader = self._readers[index]
        return ("", []) if reader is None else reader.finish()

    def _call(self, index: int, call: Call) -> Json:
        number = self._num_calls[index]
        self._num_calls[index] += 1
        # Unique in a conversation, and the same however the answer is asked for again.
        call_id = f"call_{self._head.answer_id}_{index}_{number}"
        return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _reason(self, index: int, answer: Answer) -> str:
        reason = finish_reason(answer)
        return "tool_calls" if self._num_calls[index] and reason == "stop" else reason

    def _logprobs(self, index: int, answer: Answer) -> Mapping[str, Any] | None:
        """Those of the tokens that were not told yet."""
        if not self._request.logprobs:
            return None
        first, self._num_tokens[index] = self._num_tokens[index], len(answer.tokens)
        news = zip(answer.tokens[first:], answer.top_logprobs[first:] or itertools.repeat(()), strict=False)
        return {"content": [chosen(token, likely) for token, likely in news], "refusal": None}


def _reader(request: ChatRequest) -> CallReader | None:
    """None where there are no tools to call."""
    match request.tool_choice:
        case NamedTool() as tool:
            return ForcedCallReader(tool.function.name)
        case "required":
            return ForcedCallReader(None)
        case "none":
            return None
        case _:
            if not request.tools:
                return None
            names = {tool.function.name for tool in request.tools}
            return ToolCallReader(names, only_first=request.parallel_tool_calls is False)
