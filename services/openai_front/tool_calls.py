"""Tool calls in an answer's text, as models of the field write them: JSON between ``<tool_call>`` and its end. Pure.

Most families with tools were trained on this form (Hermes, Qwen, Granite, SmolLM); between the marks stands an object
``{"name", "arguments"}`` or a list of them. What looks like a call and is none stays text.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """One call. ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


class ToolCallReader:
    """Tells calls from text while an answer grows. Text that may be the beginning of a call is held back."""

    def __init__(self, names: Collection[str]) -> None:
        """``names`` are the tools there are; a call of another one stays text."""
        self._names = frozenset(names)
        self._held = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text that is certain now, and the calls that are whole."""
        self._held += text
        plain, calls = "", list[Call]()
        while (start := self._held.find(_OPEN)) >= 0:
            end = self._held.find(_CLOSE, start)
            if end < 0:
                plain, self._held = plain + self._held[:start], self._held[start:]
                return plain, calls
            found = self._calls(self._held[start + len(_OPEN) : end])
            calls += found
            end += len(_CLOSE)
            plain += self._held[:start] if found else self._held[:end]
            self._held = self._held[end:]
        kept = _beginning(self._held)
        plain += self._held[: len(self._held) - kept]
        self._held = self._held[len(self._held) - kept :]
        return plain, calls

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, now that nothing follows: some models leave the end mark out."""
        held, self._held = self._held, ""
        calls = self._calls(held.removeprefix(_OPEN)) if held.startswith(_OPEN) else []
        return ("", calls) if calls else (held, [])

    def _calls(self, text: str) -> list[Call]:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return []
        found = [self._call(each) for each in (content if isinstance(content, list) else [content])]
        return [call for call in found if call is not None] if all(found) else []

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return Call(value["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


class ForcedCallReader:
    """The same where the whole answer is bound to be a call: of ``name``, or, without one, of the tool it names."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._text = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Nothing, until the end."""
        self._text += text
        return "", []

    def finish(self) -> tuple[str, list[Call]]:
        """The call; or the text, when it was cut before it was whole."""
        try:
            content = json.loads(self._text)
        except (ValueError, RecursionError):
            return self._text, []
        if self._name is not None:
            return "", [Call(self._name, self._text)]
        return "", [Call(content["name"], json.dumps(content["arguments"]))]


def _beginning(text: str) -> int:
    """How many of the last characters may begin a call."""
    return next((length for length in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:length])), 0)
