"""Regular expressions of JSON schemas, without the characters that an answer cannot have."""

from __future__ import annotations

import re
from typing import Final

UNWRITABLE: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that llguidance writes as ``\\uXXXX`` alone, which is off: control characters without a short escape."""

_WRITABLE: Final = r"[^\x00-\x07\x0b\x0e-\x1f\x7f]"
_PART: Final = re.compile(
    r"""
    (?P<class>\[)
    | (?P<set>\\(?: [pP](?:\{[^}]{0,99}\}|.) | [xuU]\{[^}]*\} | x.{2} | u.{4} | U.{8} | [av] ) | [\x00-\x1f\x7f])
    | \\.
    | \(\?P?<[^>]*>  # the name of a group may hold brackets
    | \(\?[a-zA-Z-]*(?P<verbose>x)
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_CLASS_PART: Final = re.compile(r"\\.|\[\^?\]?|\]", re.DOTALL)


def narrowed(pattern: str) -> str:
    """A regular expression of those strings of ``pattern`` that can be written.

    Every class loses the rest. So none has all control characters, which llguidance (1.9.1) takes to have quotation
    marks and backslashes, too: its ``[^"]`` allows them. A dot and negated digits have both and stay as they are.

    Raises:
        ValueError: it has the flag ``x``, which JSON Schema does not know.
    """
    parts, at = list[str](), 0
    while part := _PART.match(pattern, at):
        if part["verbose"]:
            raise ValueError("the flag 'x' is not supported")
        at = _class_end(pattern, at) if part["class"] else part.end()
        text = pattern[part.start() : at]
        parts.append(f"[{text}&&{_WRITABLE}]" if part["class"] or part["set"] else text)
    return "".join(parts)


def _class_end(pattern: str, start: int) -> int:
    """Where the class ends that begins at ``start``. Classes may hold classes, and ``]`` where it comes first."""
    depth = 0
    for part in _CLASS_PART.finditer(pattern, start):
        depth += {"[": 1, "]": -1}.get(part[0][0], 0)
        if not depth:
            return part.end()
    return len(pattern)
