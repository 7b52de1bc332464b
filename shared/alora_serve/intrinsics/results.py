"""From an adapter's answer to an intrinsic's result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alora_serve.intrinsics.answer import Answer
from alora_serve.intrinsics.definition import IntrinsicDefinition
from alora_serve.intrinsics.json_paths import Json, matching_paths, pointer, value_at
from alora_serve.intrinsics.likelihood import Likelihood


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an answer comes to.

    Attributes:
        result: JSON value after all transformations.
        probabilities: for each value that a likelihood weighed, by its JSON Pointer in the answer, the probability of
            each category that was among the most likely tokens.
    """

    result: Json
    probabilities: Mapping[str, Mapping[str, float]]


def conclude(definition: IntrinsicDefinition, answer: Answer) -> Outcome:
    """Apply a definition's transformations to an answer.

    Raises:
        IntrinsicOutputError: the answer is not JSON, or a transformation does not find what it takes.
    """
    document = answer.parsed()
    probabilities: dict[str, Mapping[str, float]] = {}
    for step in definition.transformations:
        for path in list(matching_paths(document, step.input_path)):
            if isinstance(step, Likelihood):
                probabilities[pointer(path)] = step.shares(path, answer, expected=value_at(document, path))
            document = step.apply(document, path, answer)
    return Outcome(document, probabilities)
