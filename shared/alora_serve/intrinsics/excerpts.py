"""What files and answers hold, in messages to people: cut short, and in characters that can be sent."""

from __future__ import annotations

from typing import Final

MAX_CHARACTERS: Final = 120


def excerpt(value: object) -> str:
    """The value as Python writes it, or the beginning of that."""
    written = repr(value)
    return written if len(written) <= MAX_CHARACTERS else f"{written[:MAX_CHARACTERS]}…"


def sendable(text: str) -> str:
    """The same text; halves of surrogate pairs, which neither UTF-8 nor protobuf has, are spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()
