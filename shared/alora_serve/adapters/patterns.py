"""Regular expressions of adapter files: read as PEFT's ``re`` reads them, and matched within a time."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final, Literal

import regex

from alora_serve.errors import AdapterRefusedError
from alora_serve.intrinsics.excerpts import excerpt

MATCHING_SECONDS: Final = 10.0
"""For all patterns of an adapter on all modules of the model. Those of real adapters take milliseconds, and a third of
a second where each of 560 modules has keys of its own; beside busy threads, some times as long."""

MAX_CHARACTERS: Final = 1 << 14
"""Of one pattern with its counted repeats written out, as `regex` does: ``(?:a{999}){999}`` would take 300 MB. The
names of all linear modules of an 8B model are some 10,000."""

_READ_OTHERWISE: Final = re.compile(r"\{(?!\d{0,4},?\d{0,4}\})|\[:|\\[NuU]|\(\?#|[^!-~]")
"""What `regex` reads as more than `re` does (fuzzy matches, classes by name), `re` is long about (ranges beyond ASCII),
or stands between a count and what it repeats (comments, spaces). No module's name needs any of it."""

_WITHOUT_REPEATS: Final = re.compile(r"(?:\(\.\*\\\.\)\?)?[\w.\\^$()]*", re.ASCII)
"""What ``re`` cannot be long about: names, escapes and groups, tried once at each dot behind PEFT's ``(.*\\.)?``."""

_ITEM: Final = re.compile(r"\{(?!\})(\d*),?(\d*)\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.")
"""A count; or what one repeats: an escape, a class, a character, or all from a bracket to the one that closes it."""


class Patterns:
    """The patterns of one adapter. ``re`` cannot be stopped and keeps Python's lock; ``regex`` can, and gives it back.

    Getting it back takes milliseconds beside a busy thread. So ``re`` matches where it is quick: adapters with a rank
    for each module have hundreds of keys, which are names, and each is tried on hundreds of modules.

    Every method raises :class:`~alora_serve.errors.AdapterRefusedError` where a pattern is no regular expression, or
    where the time of all is over, which begins with the first.
    """

    def __init__(self, seconds: float = MATCHING_SECONDS) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._compiled: dict[str, Any] = {}

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Whether ``re.fullmatch`` would match."""
        return self._run("fullmatch", pattern, text) is not None

    def match(self, pattern: str, text: str) -> Mapping[str, str | None] | None:
        """The named groups of what ``re.match`` would find; None where it would not match."""
        found = self._run("match", pattern, text)
        return None if found is None else found.groupdict()

    def _run(self, method: Literal["match", "fullmatch"], pattern: str, text: str) -> Any:
        compiled = self._compiled.get(pattern)
        if compiled is None:
            self._seconds_left(pattern)
            compiled = self._compiled[pattern] = _compile(pattern)
        seconds = self._seconds_left(pattern)
        if isinstance(compiled, re.Pattern):
            return getattr(compiled, method)(text)
        try:
            return getattr(compiled, method)(text, timeout=seconds)
        except TimeoutError as error:
            raise self._too_slow(pattern) from error

    def _seconds_left(self, pattern: str) -> float:
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._seconds
        if now >= self._deadline:
            raise self._too_slow(pattern)
        return self._deadline - now

    def _too_slow(self, pattern: str) -> AdapterRefusedError:
        return AdapterRefusedError(
            f"matching its patterns with the base model's modules takes more than {self._seconds:g} s, which ended at "
            f"{excerpt(pattern)}; list the modules by name instead"
        )


def _compile(pattern: str) -> Any:
    if odd := _READ_OTHERWISE.search(pattern):
        raise AdapterRefusedError(
            f"pattern {excerpt(pattern)} has {odd[0]!a} at {odd.start()}; read are printable ASCII without spaces and "
            "comments, and braces that count repeats"
        )
    try:
        if len(pattern) <= MAX_CHARACTERS:
            read = re.compile(pattern)  # what PEFT could not read is refused, whatever `regex` makes of it
            if _WITHOUT_REPEATS.fullmatch(pattern):
                return read
            if _characters_written_out(pattern) <= MAX_CHARACTERS:
                return regex.compile(pattern, cache_pattern=False)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
        raise AdapterRefusedError(f"{excerpt(pattern)} is not a regular expression: {error}") from error
    raise AdapterRefusedError(
        f"pattern {excerpt(pattern)} comes to more than {MAX_CHARACTERS} characters with its repeats written out"
    )


def _characters_written_out(pattern: str) -> int:
    """Those of a pattern that ``re`` has read, each counted repeat taken as often as it may be at most."""
    groups, last = [0], 0  # in each group that is open, outermost first; and in what a count would repeat
    for item in _ITEM.finditer(pattern):
        text, least, most = item[0], item[1], item[2]
        if least is not None:
            groups[-1] += last * (max(1, int(least or 0), int(most or 0)) - 1)
        elif text == "(":
            groups.append(0)
        else:
            closes = text == ")" and len(groups) > 1  # else it stands in a comment at the end, behind `(?x)` and `#`
            last = groups.pop() + len("()") if closes else len(text)
            groups[-1] += last
    return sum(groups)
