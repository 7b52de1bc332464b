"""Places in JSON: which ones a pattern names, what stands there, and where in the text a value begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from alora_serve.errors import IntrinsicOutputError
from alora_serve.intrinsics.excerpts import excerpt

Json: TypeAlias = Any
"""A parsed JSON value."""

Path: TypeAlias = tuple[str | int, ...]
"""From the whole value inwards: names of fields and positions in lists."""

Pattern: TypeAlias = tuple[str | int | None, ...]
"""A path in which None stands for any name or position."""

_DECODER: Final = json.JSONDecoder()
_WHITE_SPACE: Final = " \t\n\r"


def matching_paths(value: Json, pattern: Pattern) -> Iterator[Path]:
    """The paths in ``value`` that ``pattern`` names, in order; none is no mistake."""
    if not pattern:
        yield ()
        return
    wanted, rest = pattern[0], pattern[1:]
    for key, inner in _children(value):
        # A name is not a position; True would be 1.
        if wanted is None or (wanted == key and type(wanted) is type(key)):
            for path in matching_paths(inner, rest):
                yield (key, *path)


def value_at(value: Json, path: Path) -> Json:
    """What stands at ``path``.

    Raises:
        KeyError, IndexError, TypeError: nothing does.
    """
    for step in path:
        value = value[step]
    return value


def replaced(value: Json, path: Path, change: Callable[[Json], Json]) -> Json:
    """A copy of ``value`` in which ``change`` was made to what stands at ``path``."""
    if not path:
        return change(value)
    step, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, step: replaced(value[step], rest, change)}
    return [replaced(item, rest, change) if index == step else item for index, item in enumerate(value)]


def pointer(path: Path) -> str:
    """The path as a JSON Pointer (RFC 6901); empty for the whole value."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


def literal_start(text: str, path: Path) -> int:
    """Where in a JSON text the value at ``path`` begins, in characters; of a string, at its quotation mark.

    Raises:
        IntrinsicOutputError: nothing stands there.
    """
    start = _skip(text, 0)
    for step in path:
        found = [place for key, place in _places(text, start) if key == step]
        if not found:
            raise IntrinsicOutputError(f"the answer has nothing at {excerpt(pointer(path))}: {excerpt(text)}")
        start = found[-1]  # of a field given twice, the last counts, as it does to JSON parsers
    return start


def _children(value: Json) -> Iterator[tuple[str | int, Json]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)


def _places(text: str, start: int) -> Iterator[tuple[str | int, int]]:
    """Name or position of each value directly in the object or list at ``start``, and where it begins."""
    opening = text[start : start + 1]
    if opening not in ("{", "["):
        return
    position, index = _skip(text, start + 1), 0
    while text[position] not in "}]":
        key: str | int = index
        if opening == "{":
            key, position = _DECODER.raw_decode(text, position)
            position = _skip(text, _skip(text, position) + 1)
        yield key, position
        _, position = _DECODER.raw_decode(text, position)
        position, index = _skip(text, position), index + 1
        if text[position] == ",":
            position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] and text[position] in _WHITE_SPACE:
        position += 1
    return position


def as_records(value: Json, path: Path, rule: str, needed: Sequence[str] = ()) -> list[dict[str, Json]]:
    """``value`` as a list of objects, each of which has the ``needed`` fields.

    Raises:
        IntrinsicOutputError: it is something else.
    """
    if not isinstance(value, list):
        raise IntrinsicOutputError(f"{rule} needs a list at {excerpt(pointer(path))}, not {excerpt(value)}")
    for index, record in enumerate(value):
        missing = None if isinstance(record, dict) else "a record"
        missing = missing or next((repr(field) for field in needed if field not in record), None)
        if missing:
            raise IntrinsicOutputError(
                f"{rule} needs {missing} at {excerpt(pointer((*path, index)))}: {excerpt(record)}"
            )
    return value
