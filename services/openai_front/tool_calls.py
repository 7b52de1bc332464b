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
    """Tells calls from text while an answer grows. Text that may be the beginning of a call is held back.

    So is white space: between calls, and before the first or after the last, it is no part of the text.
    """

    def __init__(self, names: Collection[str], *, only_first: bool = False) -> None:
        """Prepare.

        Args:
            names: the tools there are; a call of another one stays text.
            only_first: leave out all calls but the first.
        """
        self._names = frozenset(names)
        self._only_first = only_first
        self._held = ""
        self._space = ""
        self._has_text = self._has_called = self._is_after_call = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text that is certain now, and the calls that are whole."""
        self._held += text
        plain, calls = "", list[Call]()
        while (start := self._held.find(_OPEN)) >= 0:
            end = self._held.find(_CLOSE, start)
            if end < 0:
                plain += self._text(self._held[:start])
                self._held = self._held[start:]
                return plain, calls
            found = self._calls(self._held[start + len(_OPEN) : end])
            end += len(_CLOSE)
            plain += self._text(self._held[:start] if found else self._held[:end])
            calls += self._noted(found)
            self._held = self._held[end:]
        kept = _beginning(self._held)
        plain += self._text(self._held[: len(self._held) - kept])
        self._held = self._held[len(self._held) - kept :]
        return plain, calls

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, now that nothing follows: some models leave the end mark out."""
        held, self._held = self._held, ""
        calls = self._calls(held.removeprefix(_OPEN)) if held.startswith(_OPEN) else []
        if calls:
            return "", self._noted(calls)
        text = self._text(held)
        return text if self._is_after_call else text + self._space, []

    def _text(self, text: str) -> str:
        """What of it is certain to be said, after the white space before it; that behind it waits for what follows."""
        whole = self._space + (text.lstrip() if self._is_after_call else text)
        said = whole.rstrip()
        self._space = whole[len(said) :]
        self._has_text, self._is_after_call = self._has_text or said != "", self._is_after_call and said == ""
        return said

    def _noted(self, calls: list[Call]) -> list[Call]:
        """Those of them that are told."""
        if not calls:
            return []
        told = calls if not self._only_first else calls[: 0 if self._has_called else 1]
        self._has_called = self._is_after_call = True
        if not self._has_text:
            self._space = ""
        return told

    def _calls(self, text: str) -> list[Call]:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return []
        found = [self._call(each) for each in (content if isinstance(content, list) else [content])]
        return [call for call in found if call is not None] if all(found) else []

    def _call(self, value: Any) -> Call | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:  # a list would not even be looked up
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return Call(name, json.dumps(arguments)) if isinstance(arguments, dict) else None


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
