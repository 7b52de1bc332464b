"""Values in messages to people, cut short: an answer or a file can be longer than an error may be."""

from __future__ import annotations

from typing import Final

MAX_CHARACTERS: Final = 120


def excerpt(value: object) -> str:
    """The value as Python writes it, or the beginning of that."""
    written = repr(value)
    return written if len(written) <= MAX_CHARACTERS else f"{written[:MAX_CHARACTERS]}…"
