"""What chat and text completions have in common of a request's body. A closed world: no other field is taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from alora_serve.client import SamplingParams
from alora_serve.errors import InvalidRequestError

MAX_SAMPLES: Final = 64
MAX_TOP_LOGPROBS: Final = 20
_TOKEN_IDS: Final = 2**32
_TOKEN_DIGITS: Final = 10
_HALF: Final = re.compile("[\ud800-\udfff]")


class Body(BaseModel):
    """Base of all that is read from a body."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _number(value: object) -> object:
    if isinstance(value, bool | str):
        raise ValueError("is no number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
"""A JSON number; neither a string nor a truth value that looks like one."""


def _whole(text: str) -> str:
    if _HALF.search(text):
        raise ValueError("holds half of a surrogate pair")
    return text


Text = Annotated[StrictStr, AfterValidator(_whole)]
"""Text that can be sent on: JSON may spell half of a character, as a text that was cut in JavaScript has it."""

Unsigned = Annotated[StrictInt, Field(ge=0, lt=2**32)]
"""What the proto has 32 bits for."""

Ignored = Any
"""Known to OpenAI's API and without a meaning here: taken, and left."""


class StreamOptions(Body):
    """What a stream carries besides the answer."""

    include_usage: StrictBool | None = None
    include_obfuscation: Ignored = None


class StructuredOutputs(Body):
    """vLLM's way to ask for a form."""

    json_schema: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None


class CompletionFields(Body):
    """The fields of both."""

    model: Annotated[Text, Field(min_length=1)]
    adapter: Text | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[StrictInt, Field(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: Unsigned | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Unsigned | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Unsigned] | None = None
    ignore_eos: StrictBool | None = None

    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def wants_stream(self) -> bool:
        """Tokens are wanted as they come."""
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        """A stream is to end with what it cost.

        Raises:
            InvalidRequestError: ``stream_options`` without a stream.
        """
        if self.stream_options is None:
            return False
        if not self.wants_stream:
            raise InvalidRequestError.of("stream_options", "needs stream: true")
        return bool(self.stream_options.include_usage)

    @property
    def num_samples(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def sampling(self, **more: Any) -> SamplingParams:
        """How to choose tokens, as far as both kinds say it; what is unset has the gRPC API's default.

        Raises:
            InvalidRequestError: what the gRPC API has no place for.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": _token_biases(self.logit_bias or {}),
            "seed": None if self.seed is None else self.seed % 2**64,  # negative ones are seeds, too
            "stop": stop,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
            **more,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    for token in biases:
        # The length first: Python reads no numbers of thousands of digits.
        is_number = token.isascii() and token.isdecimal() and len(token) <= _TOKEN_DIGITS
        if not is_number or int(token) >= _TOKEN_IDS:
            raise InvalidRequestError.of("logit_bias", f"{token[:40]!r} is no token id")
    return {int(token): bias for token, bias in biases.items()}
