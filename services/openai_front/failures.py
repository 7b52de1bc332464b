"""Errors as OpenAI's clients know them: status, headers and body, by one closed table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from alora_serve.errors import AloraServeError, FieldViolation, InvalidRequestError, StatusName

HTTP_STATUS: Final[Mapping[StatusName, int]] = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""Google's own table: 409 for FAILED_PRECONDITION would make OpenAI's clients send the same request again."""

_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""What ``error.type`` says, where it is neither ``invalid_request_error`` nor ``server_error``."""

_CODES: Final = {"CONTEXT_EXCEEDED": "context_length_exceeded"}
"""What ``error.code`` says instead of the reason: clients that shorten a conversation look for OpenAI's word."""

_SERVER_FAULTS: Final = 499
_UNAVAILABLE_RETRY_SECONDS: Final = 1.0

_GRPC_PARTS: Final = re.compile(r"\b(?:prompt|sampling)\.(?=[a-z_])")
"""Where a field is in the proto; over HTTP they all stand at the top."""
_NAMES: Final = {
    "text": "prompt",
    "token_ids": "prompt",
    "template_arguments_json": "chat_template_kwargs",
    "tools_json": "tools",
    "structured_output": "response_format",
}
"""What is called otherwise there."""
_JSON_TEXTS: Final = re.compile(r"\b(?:template_arguments|tools)_json\b")
"""Those of them whose names stand in messages, too: they can mean nothing else there."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way out.

    Attributes:
        status: of HTTP.
        headers: whether and when to send the request again, in the words that OpenAI's clients heed.
        body: ``{"error": {...}}``.
    """

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]


def failure_of(error: AloraServeError) -> Failure:
    """What a caller is told of an error of ours."""
    status = HTTP_STATUS[error.status]
    violations = [FieldViolation(_field(each.field), each.description) for each in error.violations]
    return Failure(
        status,
        _retry_headers(error),
        {
            "error": {
                "message": _JSON_TEXTS.sub(lambda name: _NAMES[name[0]], _GRPC_PARTS.sub("", str(error))),
                "type": _TYPES.get(status, "server_error" if status >= _SERVER_FAULTS else "invalid_request_error"),
                "param": violations[0].field if violations else ("model" if error.status == "NOT_FOUND" else None),
                "code": _CODES.get(error.reason, error.reason),
                **({"violations": [_violation(each) for each in violations]} if len(violations) > 1 else {}),
            }
        },
    )


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> InvalidRequestError:
    """What pydantic found in a body, each thing once, by where it stands there."""
    found: dict[str, str] = {}
    for detail in errors:
        field = field_path(_place(detail["loc"], body, is_missing=detail["type"] == "missing"))
        found.setdefault(field, _UNKNOWN if detail["type"] in _UNKNOWN_TYPES else _complaint(detail))
    violations = [FieldViolation(field, description) for field, description in found.items()]
    return InvalidRequestError(
        "; ".join(f"{each.field}: {each.description}" if each.field else each.description for each in violations),
        violations=violations,
    )


def _complaint(detail: Mapping[str, Any]) -> str:
    return str(detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"])


def _place(location: Sequence[int | str], body: Any, *, is_missing: bool) -> list[int | str]:
    """The parts that lead into the body. Between them, pydantic names the branches of unions, which nobody sent."""
    place: list[int | str] = []
    for part in location[1:]:  # the first is "body"
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            place.append(part)
            body = body[part]  # type: ignore[index]
    return [*place, *location[1:][-1:]] if is_missing else place


_NAME_CHARACTERS: Final = 60
_UNKNOWN_TYPES: Final = frozenset({"extra_forbidden", "none_required"})
"""Of pydantic's complaints: about a field that is not there, or takes nothing but null."""
_UNKNOWN: Final = "is no field that this server knows; see docs/http.md for those it takes"


def field_path(location: Sequence[int | str]) -> str:
    """``messages[0].content`` from its parts; of a name that is longer than any here, the beginning."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:_NAME_CHARACTERS]}"
    return path.removeprefix(".")


def _field(grpc_field: str) -> str:
    field = _GRPC_PARTS.sub("", grpc_field)
    head = re.match(r"\w+", field)
    return field if head is None else _NAMES.get(head[0], head[0]) + field[head.end() :]


def _retry_headers(error: AloraServeError) -> dict[str, str]:
    seconds = error.retry_after_seconds
    if error.status == "UNAVAILABLE":
        seconds = seconds or _UNAVAILABLE_RETRY_SECONDS
    if seconds is None:
        return {"x-should-retry": "false"}
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


def _violation(violation: FieldViolation) -> dict[str, str]:
    return {"param": violation.field, "message": violation.description}
