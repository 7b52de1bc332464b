"""JSON schemas before they are compiled: what llguidance would take and not hold to is refused, or narrowed."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any, Final

from alora_serve.errors import InvalidRequestError
from alora_serve.model.structure.bounds import (
    MAX_DIVISOR,
    MAX_JOINT_PATTERNS,
    MAX_OPTIONAL_PARTS,
    odd_divisor,
    optional_parts,
)
from alora_serve.model.structure.numbers import MAX_INTEGER, is_float, narrow_numbers
from alora_serve.model.structure.patterns import UNWRITABLE, narrowed

CONTROL_CHARACTERS: Final = "control characters other than \\b, \\t, \\n, \\f and \\r"
"""What no string of an answer has."""

_NAMED_SCHEMAS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value's keys are names, not keywords."""
_PLAIN_VALUES: Final = ("const", "enum", "default", "examples")
"""Keywords whose value is no schema."""
_CONSTRAINTS: Final = frozenset(
    {"pattern", "format", "properties", "patternProperties", "additionalProperties", "items", "prefixItems", "allOf"}
)

_REAL_DAY: Final = (
    "^(?:"
    # Years that four divides, of those that a hundred divides only each fourth: these alone have a 29 February.
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-"
    "|(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-(?:0[13-9]|1|02-[01]|02-2[0-8])"
    ")"
)
_REAL_SECOND: Final = ":[0-9]{2}:[0-5]"
_STRICTER_FORMATS: Final = {"date": [_REAL_DAY], "time": [_REAL_SECOND], "date-time": [_REAL_DAY, _REAL_SECOND]}
"""Patterns that leave of a format what there is: llguidance also takes 2023-02-29, 0000-01-01 and 12:00:60Z for one."""


def schemas_in(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema, itself included, with its JSON pointer."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from schemas_in(item, f"{path}/{index}")
    if not isinstance(value, dict):
        return
    yield path, value
    for keyword, inner in value.items():
        if keyword in _NAMED_SCHEMAS and isinstance(inner, dict):
            for name, schema in inner.items():
                yield from schemas_in(schema, f"{path}/{keyword}/{escaped(name)}")
        elif keyword not in _PLAIN_VALUES:
            yield from schemas_in(inner, f"{path}/{escaped(keyword)}")


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def keyword_places(schema: Any, keywords: Set[str]) -> Iterator[tuple[str, str]]:
    """Where the keywords stand in a schema: JSON pointer and keyword."""
    for path, inner in schemas_in(schema):
        for keyword in sorted(keywords & inner.keys()):
            yield path or "/", keyword


def check_schema(schema: Any, field: str) -> None:
    """Refuse what llguidance would not, and cannot hold to.

    Raises:
        InvalidRequestError: of ``field``; names the keyword and its place.
    """
    if schema is False:
        raise InvalidRequestError.of(field, "false allows no answer")
    patterns, joints = set[str](), 0
    for path, inner in schemas_in(schema):
        for keyword, complaint in _complaints(inner):
            raise InvalidRequestError.of(field, f"{keyword!r} at {path or '/'} is not supported {complaint}")
        patterns.update(f"{keyword} {inner[keyword]}" for keyword in ("pattern", "format") if keyword in inner)
        joints += _joints(inner)
    if min(len(patterns), joints) > MAX_JOINT_PATTERNS:
        told = f"more than {MAX_JOINT_PATTERNS} different patterns and formats are not supported"
        raise InvalidRequestError.of(field, f"{told} where so many schemas are joined, by 'allOf' or '$ref', say")


def narrow_schema(schema: Any, field: str) -> None:
    """Take out of its patterns, in place, what an answer cannot have, and out of formats and bounds what there is not.

    Raises:
        InvalidRequestError: of ``field``; a pattern has a flag that JSON Schema does not know.
    """
    for path, inner in list(schemas_in(schema)):
        if inner.get("uniqueItems") is False:  # as if it were not there, and llguidance knows it in no way
            del inner["uniqueItems"]
        try:
            if isinstance(inner.get("pattern"), str):
                inner["pattern"] = narrowed(inner["pattern"])
            if isinstance(named := inner.get("patternProperties"), dict):
                inner["patternProperties"] = {narrowed(pattern): value for pattern, value in named.items()}
        except ValueError as error:
            raise InvalidRequestError.of(field, f"{error} in a pattern at {path or '/'}") from error
        narrow_numbers(inner)
        stricter = _STRICTER_FORMATS.get(str(inner.get("format")), [])
        if stricter and isinstance(every := inner.get("allOf", []), list):
            inner["allOf"] = [*every, *({"pattern": pattern} for pattern in stricter)]


def _joints(schema: dict[str, Any]) -> int:
    """How many others a value must fit because it fits this one, at most."""
    every = schema.get("allOf")
    beside = _CONSTRAINTS & schema.keys() and schema.keys() & {"$ref", "anyOf", "oneOf"}
    return (len(every) if isinstance(every, list) else 0) + len(beside or ()) + ("patternProperties" in schema)


def _complaints(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keywords of this schema itself that cannot be held to, and why."""
    least, required = schema.get("minProperties"), schema.get("required")
    known = len(set(required)) if isinstance(required, list) else 0
    if isinstance(least, int) and least > known + 1:
        # A grammar cannot see that two names are the same, and JSON would keep one of them.
        yield "minProperties", "beyond the properties that are required"
    named = schema.get("patternProperties")
    for keyword, patterns in (("pattern", [schema.get("pattern")]), ("patternProperties", named)):
        for pattern in patterns if isinstance(patterns, list | dict) else ():
            if isinstance(pattern, str) and optional_parts(pattern) > MAX_OPTIONAL_PARTS:
                yield keyword, f"with more than {MAX_OPTIONAL_PARTS} parts that may be left out"
    multiple = schema.get("multipleOf")
    if type(multiple) is float and not is_float(multiple):
        yield "multipleOf", f"with {multiple}, which no 64-bit float is: validators refuse some of its multiples"
    if type(multiple) in (int, float) and odd_divisor(multiple) > MAX_DIVISOR:
        yield "multipleOf", f"beyond {MAX_DIVISOR}, factors of 2 and 5 not counted"
    for keyword in ("const", "enum", "required", "properties"):
        value = schema.get(keyword)
        told = list(value) if keyword == "properties" and isinstance(value, dict) else value
        for plain in _plain_values(told):
            if isinstance(plain, str) and UNWRITABLE.search(plain):
                yield keyword, f"with {CONTROL_CHARACTERS}"
            if isinstance(plain, int) and abs(plain) > MAX_INTEGER:
                yield keyword, f"with an integer beyond {MAX_INTEGER}"


def _plain_values(value: Any) -> Iterator[Any]:
    """Texts, numbers and names within a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _plain_values(item)
    else:
        yield value
