"""From what a caller writes to the request it means. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias, TypedDict

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.convert import (
    FanOut,
    Scoring,
    Target,
    fan_out_to_proto,
    generate_to_proto,
    prompt_to_proto,
    scoring_to_proto,
    tokenize_to_proto,
)
from alora_serve.types import (
    ChatMessage,
    Document,
    IntrinsicRun,
    PrefixHandle,
    Prompt,
    SamplingParams,
    StructuredOutput,
    ToolCall,
)
from alora_serve.v1 import alora_pb2

Messages: TypeAlias = str | Sequence[ChatMessage | Mapping[str, Any]]
"""A conversation: :class:`ChatMessage` objects, mappings with ``role`` and ``content`` (and, as needed, ``name``,
``tool_calls``, ``tool_call_id``), or one string: a single turn of the user."""


class PromptFields(TypedDict, total=False):
    """What may stand beside or instead of messages; see :class:`alora_serve.types.Prompt`."""

    handle: PrefixHandle
    token_ids: Sequence[int]
    text: str
    documents: Sequence[Document]
    tools: Sequence[Mapping[str, Any]]
    template_arguments: Mapping[str, Any]
    prompt: Prompt
    """The whole prompt, instead of all other fields and messages."""


class GenerateFields(PromptFields, total=False):
    """Prompt and sampling in one; see :class:`alora_serve.types.SamplingParams` for the latter."""

    sampling: SamplingParams
    """All sampling parameters at once; those given one by one replace its own."""
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    structured_output: StructuredOutput | None
    default_max_tokens: int


_PROMPT_FIELDS: Final = PromptFields.__optional_keys__
_SAMPLING_FIELDS: Final = GenerateFields.__optional_keys__ - _PROMPT_FIELDS - {"sampling"}


def build_prompt(messages: Messages | None, fields: Mapping[str, Any]) -> Prompt:
    """The prompt that messages and :class:`PromptFields` mean; the server checks its sense.

    Raises:
        InvalidRequestError: a message that is no message, or ``prompt`` beside what it replaces.
        TypeError: an unknown argument.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    _refuse_unknown(given, _PROMPT_FIELDS)
    if "prompt" in given:
        if messages is not None or len(given) > 1:
            raise InvalidRequestError.of("prompt", "is the whole prompt and goes with no other part of one")
        whole: Prompt = given["prompt"]
        return whole
    return Prompt(
        messages=_turns(messages),
        token_ids=tuple(given.get("token_ids", ())),
        handle=given.get("handle"),
        documents=tuple(given.get("documents", ())),
        template_arguments=given.get("template_arguments", {}),
        tools=tuple(given.get("tools", ())),
        text=given.get("text", ""),
    )


def generate_request(
    messages: Messages | None, adapter: str | None, fields: Mapping[str, Any]
) -> alora_pb2.GenerateRequest:
    """One generation. Raises as :func:`build_prompt`."""
    prompt, sampling = _split(messages, fields)
    if sampling.n > 1:
        raise InvalidRequestError.of("sampling.n", "generate gives one answer; ask sample for several")
    return generate_to_proto(prompt, Target(adapter or "", sampling))


def sample_request(
    messages: Messages | None, count: int, adapter: str | None, fields: Mapping[str, Any]
) -> alora_pb2.GenerateRequest:
    """Several generations of one prompt. Raises as :func:`build_prompt`."""
    prompt, sampling = _split(messages, fields)
    return generate_to_proto(prompt, Target(adapter or "", dataclasses.replace(sampling, n=count)))


def fan_out_request(
    messages: Messages | None, adapters: Sequence[str | Target | None], fields: Mapping[str, Any]
) -> alora_pb2.FanOutRequest:
    """One conversation, many targets; a :class:`Target` brings its own sampling. Raises as :func:`build_prompt`."""
    prompt, sampling = _split(messages, fields)
    targets = (target if isinstance(target, Target) else Target(target or "", sampling) for target in adapters)
    return fan_out_to_proto(FanOut(prompt, tuple(targets)))


def intrinsic_run(
    messages: Messages | None,
    intrinsics: Sequence[str],
    parameters: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
) -> IntrinsicRun:
    """One conversation and the intrinsics that judge it. Raises as :func:`build_prompt`."""
    return IntrinsicRun(build_prompt(messages, fields), tuple(intrinsics), parameters or {})


def prefill_request(messages: Messages | None, fields: Mapping[str, Any]) -> alora_pb2.PrefillRequest:
    """A conversation to warm. Raises as :func:`build_prompt`."""
    return alora_pb2.PrefillRequest(prompt=prompt_to_proto(build_prompt(messages, fields)))


def tokenize_request(messages: Messages | None, fields: Mapping[str, Any]) -> alora_pb2.TokenizeRequest:
    """A prompt to tokenize. Raises as :func:`build_prompt`."""
    return tokenize_to_proto(build_prompt(messages, fields))


def score_request(
    messages: Messages | None, continuations: Sequence[str], adapter: str | None, fields: Mapping[str, Any]
) -> alora_pb2.ScoreRequest:
    """Texts to score after a conversation. Raises as :func:`build_prompt`, and for a single string of them."""
    if isinstance(continuations, str):  # a string is a sequence of its characters, which is never what is meant
        raise InvalidRequestError.of("continuations", "is one string; pass a list of them")
    return scoring_to_proto(Scoring(build_prompt(messages, fields), adapter or "", tuple(continuations)))


def _split(messages: Messages | None, fields: Mapping[str, Any]) -> tuple[Prompt, SamplingParams]:
    sampling = {name: value for name, value in fields.items() if name in _SAMPLING_FIELDS}
    rest = {name: value for name, value in fields.items() if name not in sampling and name != "sampling"}
    for name in ("stop", "stop_token_ids"):
        if name in sampling:
            # A string is a sequence of its characters, which is never what is meant.
            single = isinstance(sampling[name], str)
            sampling[name] = (sampling[name],) if single else tuple(sampling[name])
    base = fields.get("sampling") or SamplingParams()
    return build_prompt(messages, rest), dataclasses.replace(base, **sampling)


def _turns(messages: Messages | None) -> tuple[ChatMessage, ...]:
    if messages is None:
        return ()
    if isinstance(messages, str):
        return (ChatMessage("user", messages),)
    return tuple(_turn(message, f"prompt.messages[{index}]") for index, message in enumerate(messages))


def _turn(message: ChatMessage | Mapping[str, Any], field: str) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    try:
        calls = tuple(
            call if isinstance(call, ToolCall) else ToolCall(**call) for call in message.get("tool_calls") or ()
        )
        return ChatMessage(**{**message, "content": message.get("content") or "", "tool_calls": calls})
    except (TypeError, AttributeError) as error:
        raise InvalidRequestError.of(field, f"is no message: {error}") from error


def _refuse_unknown(given: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"unexpected argument {name!r}")
