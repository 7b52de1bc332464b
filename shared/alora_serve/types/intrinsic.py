"""Intrinsics: which ones are run on a conversation, and what they find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alora_serve.types.answer import Timings, Usage
from alora_serve.types.prompt import Prompt


@dataclass(frozen=True, slots=True)
class IntrinsicRun:
    """One conversation, and the intrinsics that judge it.

    Attributes:
        names: of their adapters.
        parameters: texts, numbers and booleans that their instructions name.
        done: positions of those that are not asked again: an interrupted call has brought their results.
    """

    prompt: Prompt
    names: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    done: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class IntrinsicResult:
    """What one intrinsic found.

    Attributes:
        result: JSON value, of the type that the intrinsic declares.
        raw_text: the answer before transformations.
        probabilities: for each place in the answer that a likelihood weighed, by its JSON Pointer, how likely each
            category was; empty where nothing was weighed.
    """

    result: Any
    raw_text: str
    usage: Usage
    timings: Timings
    probabilities: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
