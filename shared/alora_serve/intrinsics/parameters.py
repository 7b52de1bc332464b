"""The ``parameters`` of an ``io.yaml``: those of a chat completion that have a meaning here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from alora_serve.intrinsics.fields import Fields
from alora_serve.types import SamplingParams

_NUMBERS: Final = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_LENGTHS: Final = ("max_completion_tokens", "max_tokens")
_BESIDE: Final = ("top_k", "min_p", "repetition_penalty")
"""Not in OpenAI's API, so that libraries put them into ``extra_body``."""


def read_parameters(given: Fields | None) -> tuple[SamplingParams, Mapping[str, Any]]:
    """How to choose tokens, and arguments of the chat template.

    Raises:
        AdapterRefusedError: an unknown parameter, or a value that is none of its kind.
    """
    if given is None:
        return SamplingParams(), {}
    found = _numbers(given, _NUMBERS) | _integers(given)
    template_arguments: Mapping[str, Any] = {}
    extra = given.inner("extra_body")
    if extra is not None:
        found |= _numbers(extra, [name for name in _BESIDE if name in _NUMBERS])
        found |= _given(extra.integer, "top_k", 0)
        if extra.take("chat_template_kwargs") is not None:
            template_arguments = _json_object(extra, "chat_template_kwargs")
        extra.end()
    stop = given.take("stop")
    if stop is not None:
        found["stop"] = (stop,) if isinstance(stop, str) else given.names("stop")
    given.end()
    return SamplingParams(**found), template_arguments


def _json_object(fields: Fields, field: str) -> Mapping[str, Any]:
    value = fields.mapping(field)
    try:
        plain: Mapping[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        fields.refuse(field, f"it is not JSON ({error})")
    return plain


def _numbers(fields: Fields, names: Any) -> dict[str, Any]:
    return {name: value for name in names if (value := fields.number(name)) is not None}


def _integers(fields: Fields) -> dict[str, Any]:
    lengths = [length for name in _LENGTHS if (length := fields.integer(name, 1)) is not None]
    found = {"max_tokens": min(lengths)} if lengths else {}
    return found | _given(fields.integer, "top_k", 0) | _given(partial(fields.integer, bits=64), "seed", 0)


def _given(read: Callable[[str, int], int | None], name: str, minimum: int) -> dict[str, Any]:
    value = read(name, minimum)
    return {} if value is None else {name: value}
