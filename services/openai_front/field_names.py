"""What a router says of fields, in the words of the request that it answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from alora_serve.errors import AloraServeError, FieldViolation

ALL_TOOLS: Final = "tools"
"""The field of a form that one schema makes of all tools."""

_FIELDS: Final = {
    "structured_output": re.compile(r"\bstructured_output(?:\.(?:json_schema|regex|grammar|choice(?:\.values)?))?"),
    "max_tokens": re.compile(r"\bmax_tokens\b"),
    "prompt": re.compile(r"^prompt(?=:|$)"),
}
_TOOL_PLACE: Final = re.compile(r"(?:/anyOf/(\d+))?/properties/arguments(?![^/:;, ])")
"""Where the parameters of a tool are in that schema."""


def as_asked(error: AloraServeError, names: Mapping[str, str]) -> AloraServeError:
    """The same error of a request that has its own ``names`` for fields of the gRPC API."""
    found = [_violation(each, names) for each in error.violations]
    message = _said(str(error), names)
    if str(error) == _told(error.violations):
        message = _told(found)
    return type(error)(
        message, violations=found, retry_after_seconds=error.retry_after_seconds, metadata=error.metadata
    )


def _violation(violation: FieldViolation, names: Mapping[str, str]) -> FieldViolation:
    field, description = _said(violation.field, names), _said(violation.description, names)
    places = {place[1] for place in _TOOL_PLACE.finditer(description)}
    if field.rpartition("sampling.")[2] == ALL_TOOLS and len(places) == 1:
        field = f"{field}[{places.pop() or 0}].function.parameters"
        description = _TOOL_PLACE.sub(
            lambda place: "" if description[place.end() :].startswith("/") else "/", description
        )
    return FieldViolation(field, description)


def _told(violations: list[FieldViolation] | tuple[FieldViolation, ...]) -> str:
    return "; ".join(f"{each.field}: {each.description}" for each in violations)


def _said(text: str, names: Mapping[str, str]) -> str:
    for field, pattern in _FIELDS.items():
        if name := names.get(field):
            text = pattern.sub(lambda _, name=name: name, text)  # type: ignore[misc]
    return text
