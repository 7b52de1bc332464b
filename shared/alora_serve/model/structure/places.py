"""Where in a JSON schema the fault lies of which llguidance tells no place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, Final
from urllib.parse import quote, unquote

from alora_serve.model.structure.schemas import escaped

MAX_TRIALS: Final = 64
MAX_TRIED_CHARACTERS: Final = 2 << 20
"""Bounds of the search for a fault. A schema of 128 KiB compiles for some 100 ms at most, and so do 16 trials of it."""

UNSATISFIABLE: Final = "Unsatisfiable schema"
"""How llguidance begins what it says of a schema that no value fits."""

_NAMED: Final = ("properties", "patternProperties")
_APPLIED: Final = ("anyOf", "oneOf", "allOf", "items", "prefixItems", "additionalItems", "additionalProperties")
_ROOT: Final = "x-root"


def place_of_fault(schema: Mapping[str, Any], fault: str, compiled: Callable[[Any], str]) -> tuple[str, str]:
    """The innermost schema that has the fault by itself: its JSON pointer, and what is said of it alone.

    It is looked for by compiling parts of the schema. Where the bounds are met, a part that has it somewhere is told.

    Args:
        schema: has it somewhere.
        fault: what is said of the whole.
        compiled: what is said of a schema; empty where it is sound.
    """
    dialect = {"$schema": schema["$schema"]} if "$schema" in schema else {}
    path, seen = "", {""}
    left = min(MAX_TRIALS, MAX_TRIED_CHARACTERS // len(json.dumps(schema)))

    def said_of(paths: list[str], rest: Any) -> str:
        """What is said of an object that must have all of these parts of the schema, or of the only one."""
        parts = {str(index): {"$ref": f"#/{_ROOT}{quote(part)}"} for index, part in enumerate(paths)}
        trial = parts["0"] if len(paths) == 1 else {"properties": parts, "required": list(parts)}
        nonlocal left
        left -= 1
        return compiled({**dialect, **trial, _ROOT: rest}).replace(f"/{_ROOT}", "")

    while left > 0:
        rest = _rebased(schema, seen)
        parts = [part for part in _parts(schema, path, fault) if part not in seen]
        while len(parts) > 1 and left > 0:
            half = parts[: len(parts) // 2]
            parts = half if _is_same(said_of(half, rest), fault) else parts[len(half) :]
        found = said_of(parts, rest) if len(parts) == 1 else ""
        if not _is_same(found, fault):
            break
        [path], fault = parts, found
        seen.add(path)
    return path, fault


def _is_same(found: str, fault: str) -> bool:
    # What surrounds a schema that allows nothing tells of it in other words.
    return found == fault or (found.startswith(UNSATISFIABLE) and fault.startswith(UNSATISFIABLE))


def _parts(schema: Any, path: str, fault: str) -> Iterator[str]:
    """JSON pointers of the schemas right within the one at ``path``, and of the one that it refers to."""
    here = _at(schema, path)
    if not isinstance(here, dict):
        return
    for keyword in _NAMED:
        named, required = here.get(keyword), here.get("required")
        for name in named if isinstance(named, dict) else ():
            # A property that allows nothing is no fault where it may be left out.
            if not fault.startswith(UNSATISFIABLE) or (isinstance(required, list) and name in required):
                yield f"{path}/{keyword}/{escaped(name)}"
    for keyword in _APPLIED:
        if isinstance(applied := here.get(keyword), list):
            yield from (f"{path}/{keyword}/{index}" for index in range(len(applied)))
        elif applied is not None:
            yield f"{path}/{keyword}"
    reference = here.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") and _at(schema, unquote(reference[1:])) is not None:
        yield unquote(reference[1:])


def _at(schema: Any, path: str) -> Any:
    """What stands at a JSON pointer; None where nothing does."""
    for part in path.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list):
            schema = dict(enumerate(schema)).get(int(name) if name.isdecimal() else -1)
        else:
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def _rebased(value: Any, seen: Set[str]) -> Any:
    """The schema as a part of another, to whose place its references lead; those to ``seen`` places are left out."""
    if isinstance(value, list):
        return [_rebased(item, seen) for item in value]
    if not isinstance(value, dict):
        return value
    copied = {name: _rebased(item, seen) for name, item in value.items()}
    reference = copied.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        copied["$ref"] = f"#/{_ROOT}{reference[1:]}"
        if unquote(reference[1:]) in seen:
            del copied["$ref"]
    return copied
