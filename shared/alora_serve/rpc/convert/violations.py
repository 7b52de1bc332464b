"""Collects everything wrong with a request, so that a caller learns all of it from one answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from alora_serve.errors import FieldViolation, InvalidRequestError

SUMMARY_VIOLATIONS: Final = 3
"""How many violations the message spells out; the details carry all."""


class Violations:
    """The bad fields found so far. Not thread-safe; one per request."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Note that ``field`` (its path as in the proto) is bad, and why."""
        self._found.append(FieldViolation(field, description))

    def extend(self, found: Iterable[FieldViolation]) -> None:
        """Note what was found elsewhere."""
        self._found.extend(found)

    def require(self, holds: bool, field: str, description: str) -> None:
        """Note ``field`` as bad unless ``holds``."""
        if not holds:
            self.add(field, description)

    def raise_if_any(self) -> None:
        """End the collection.

        Raises:
            InvalidRequestError: with every violation, when there is one.
        """
        if self._found:
            summary = "; ".join(f"{bad.field}: {bad.description}" for bad in self._found[:SUMMARY_VIOLATIONS])
            hidden = len(self._found) - SUMMARY_VIOLATIONS
            raise InvalidRequestError(
                f"{summary}; and {hidden} more" if hidden > 0 else summary, violations=self._found
            )
