"""Forms of a few bytes for which llguidance would take all memory, or minutes, before a limit of its own is met."""

from __future__ import annotations

import re
from decimal import Decimal
from graphlib import CycleError, TopologicalSorter
from typing import Any, Final

MAX_OPTIONAL_PARTS: Final = 1000
"""Of one regular expression. For each in a row, all that may follow it is written out: a thousand take half a second
and up to 100 MB, sixteen thousand more than there is."""

MAX_JOINT_PATTERNS: Final = 8
"""That one string may have to fit. Whether any string fits more is rarely found out, and what is said of it then has a
length that doubles with each."""

MAX_DIVISOR: Final = 100_000
"""An automaton that counts remainders has so many states: a million take 400 MB and half a minute."""

_OPTIONAL: Final = re.compile(
    r"""
    [?*\#]  # some begin a group or a comment: they count, too
    | [{~]\s*[0,]
    | \(\s*(?=[|)]) | \|\s*(?=[|)]) | \A\s*(?:\||\Z) | \|\s*\Z
    | \\u00[0-7]  # one of these in a JSON string
    """,
    re.VERBOSE,
)
LARK_TEXT: Final = r'"(?:\\.|[^"\\])*"|/(?!/)(?:\\.|[^/\\])+/|(?://|\#)[^\n]*'
"""Strings, regular expressions and comments of Lark's syntax: what looks like anything else in them is nothing else."""
_LARK_DEFINITION: Final = re.compile(r"^\s*[?!]*(\w+)(?:\[[^\]\n]*\]|::\w+)*\s*:", re.MULTILINE)
_LARK_TERMINAL: Final = re.compile(r"\b_?[A-Z][A-Z0-9_]*\b")


def optional_parts(expression: str) -> int:
    """How many parts of a regular expression may be left out, at most."""
    return sum(1 for _ in _OPTIONAL.finditer(expression))


def most_optional_parts(lark: str) -> int:
    """The same of a grammar's rule or terminal that has most of them. Terminals become one regular expression each.

    Raises:
        ValueError: a terminal leads back to itself, which llguidance takes where nothing else leads to it.
    """
    bodies = _bodies(re.sub(LARK_TEXT, _marks, lark, flags=re.DOTALL))
    named = {name: _LARK_TERMINAL.findall(body) for name, body in bodies.items() if _LARK_TERMINAL.fullmatch(name)}
    found = {name: optional_parts(body) + body.count("[") for name, body in bodies.items()}
    try:
        for name in TopologicalSorter(named).static_order():
            found[name] = found.get(name, 0) + sum(found[inner] for inner in named.get(name, ()))
    except CycleError as error:
        raise ValueError(f"the terminal {error.args[1][0]!r} leads back to itself") from error
    return max(found.values(), default=0)


def odd_divisor(multiple: Any) -> int:
    """A number as an integer without factors of 2 and 5: how many remainders are told apart to find its multiples."""
    digits = Decimal(str(multiple)).as_tuple().digits
    divisor = int("".join(map(str, digits)))
    for factor in (2, 5):
        while divisor and divisor % factor == 0:
            divisor //= factor
    return divisor


def _bodies(lark: str) -> dict[str, str]:
    """What each name stands for; strings and regular expressions are marks only."""
    definitions = list(_LARK_DEFINITION.finditer(lark))
    first, *ends = [*(definition.start() for definition in definitions), len(lark)]
    bodies = {"": lark[:first]}
    for definition, end in zip(definitions, ends, strict=True):
        bodies[definition[1]] = bodies.get(definition[1], "") + lark[definition.end() : end]
    return bodies


def _marks(text: re.Match[str]) -> str:
    """As many marks as it has optional parts, and nothing that looks like a name."""
    if text[0].startswith(("//", "#")):
        return ""
    return '"' + "?" * optional_parts(text[0][1:-1]) + '"'
