"""Forms of answers, and what can be checked of them without the model; a worker compiles them and checks the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.rpc.convert.violations import Violations
from alora_serve.types import Choice, Grammar, JsonSchema, Regex, StructuredOutput
from alora_serve.v1 import types_pb2

MAX_FORM_BYTES: Final = 128 << 10
"""Of a schema, a regular expression, a grammar, or all choices together."""
MAX_CHOICES: Final = 1024
MAX_SCHEMA_NESTING: Final = 64
"""Objects and lists of a JSON schema within one another."""


def read_structure(message: types_pb2.StructuredOutput, violations: Violations, *, field: str) -> StructuredOutput:
    """The form; notes what is wrong with it."""
    match message.WhichOneof("form"):
        case "json_schema":
            _check_text(message.json_schema, violations, f"{field}.json_schema")
            _check_schema(message.json_schema, violations, f"{field}.json_schema")
            return JsonSchema(message.json_schema)
        case "regex":
            _check_text(message.regex, violations, f"{field}.regex")
            return Regex(message.regex)
        case "grammar":
            _check_text(message.grammar, violations, f"{field}.grammar")
            return Grammar(message.grammar)
        case "choice":
            _check_choices(message.choice.values, violations, f"{field}.choice.values")
            return Choice(tuple(message.choice.values))
        case _:
            violations.add(field, "has no form: set json_schema, regex, grammar or choice")
            return Choice(())


def structure_to_proto(form: StructuredOutput) -> types_pb2.StructuredOutput:
    """The form as sent."""
    match form:
        case JsonSchema(schema):
            return types_pb2.StructuredOutput(json_schema=schema)
        case Regex(pattern):
            return types_pb2.StructuredOutput(regex=pattern)
        case Grammar(grammar):
            return types_pb2.StructuredOutput(grammar=grammar)
        case Choice(values):
            return types_pb2.StructuredOutput(choice=types_pb2.Choice(values=values))


def _check_text(text: str, violations: Violations, field: str) -> None:
    violations.require(text.strip() != "", field, "is empty")
    _check_size(len(text.encode()), violations, field)


def _check_size(size_bytes: int, violations: Violations, field: str) -> None:
    violations.require(
        size_bytes <= MAX_FORM_BYTES, field, f"its {size_bytes} bytes are more than {MAX_FORM_BYTES}: simplify it"
    )


def _check_schema(text: str, violations: Violations, field: str) -> None:
    try:
        schema = json.loads(text, parse_constant=refuse_constant)
        nesting = max(depths(schema))
    except (ValueError, RecursionError) as error:
        too_deep = isinstance(error, RecursionError)
        violations.add(field, "is nested too deeply" if too_deep else f"is not JSON: {error}")
        return
    violations.require(isinstance(schema, dict | bool), field, "is not a JSON object, as schemas are")
    violations.require(
        nesting <= MAX_SCHEMA_NESTING, field, f"its nesting of {nesting} levels is more than {MAX_SCHEMA_NESTING}"
    )


def depths(value: Any) -> Iterator[int]:
    """How deep every value inside of JSON stands; the whole has 1."""
    left = [(value, 1)]
    while left:
        inner, depth = left.pop()
        yield depth
        if isinstance(inner, dict | list):
            left += [(item, depth + 1) for item in (inner.values() if isinstance(inner, dict) else inner)]


def refuse_constant(name: str) -> NoReturn:
    """Raises ValueError: NaN and the infinities, which Python reads, are no JSON."""
    raise ValueError(f"{name} is no JSON")


def _check_choices(values: Any, violations: Violations, field: str) -> None:
    count = len(values)
    violations.require(1 <= count <= MAX_CHOICES, field, f"{count} choices are not 1 to {MAX_CHOICES}")
    _check_size(sum(len(value.encode()) for value in values), violations, field)
    for index, value in enumerate(values[:MAX_CHOICES]):
        violations.require(value != "", f"{field}[{index}]", "is empty, which would be no answer")
    for value, times in Counter(values[:MAX_CHOICES]).items():
        violations.require(times == 1, field, f"{excerpt(value)} is given {times} times")
