"""Errors keep their meaning over HTTP: one status each, the field's name there, and whether to send again."""

from __future__ import annotations

from typing import get_args

import pytest

from alora_serve import errors
from alora_serve.errors import FieldViolation, InvalidRequestError, StatusName
from openai_front.failures import HTTP_STATUS, failure_of, field_path


def test_every_grpc_status_has_an_http_status() -> None:
    assert set(HTTP_STATUS) == set(get_args(StatusName))


def test_the_page_lists_the_same_table(pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs" / "http.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith(("| 4", "| 5"))]
    documented = {name.strip(" `"): int(status) for status, names in rows for name in names.split(",") if "`" in name}
    assert documented == HTTP_STATUS


def test_fields_are_named_as_over_http() -> None:
    violations = [
        FieldViolation("sampling.top_p", "is 0"),
        FieldViolation("prompt.messages[1].role", "is a robot's"),
        FieldViolation("prompt.token_ids", "holds too much"),
        FieldViolation("sampling.structured_output.json_schema", "has no end"),
        FieldViolation("prompt.tools_json[1]", "is too deep"),
        FieldViolation("prompt.template_arguments_json", "is too deep"),
    ]
    message = "sampling.top_p: is 0; prompt.messages[1].role: ...; prompt.tools_json[1]: is too deep"
    failure = failure_of(InvalidRequestError(message, violations=violations))
    error = failure.body["error"]
    assert failure.status == 400
    assert error["message"] == "top_p: is 0; messages[1].role: ...; tools[1]: is too deep"
    assert (error["param"], error["type"], error["code"]) == ("top_p", "invalid_request_error", "REQUEST_INVALID")
    named = [violation["param"] for violation in error["violations"]]
    assert named == [
        "top_p",
        "messages[1].role",
        "prompt",
        "response_format.json_schema",
        "tools[1]",
        "chat_template_kwargs",
    ]


@pytest.mark.parametrize(
    ("error", "status", "kind", "headers"),
    [
        (errors.OverloadedError("full", retry_after_seconds=1.2), 429, "rate_limit_error", {"retry-after": "2"}),
        (errors.OverloadedError("quota"), 429, "rate_limit_error", {"x-should-retry": "false"}),
        (errors.UnavailableError("nobody"), 503, "server_error", {"retry-after": "1", "retry-after-ms": "1000"}),
        (errors.UnavailableError("soon", retry_after_seconds=0.25), 503, "server_error", {"retry-after-ms": "250"}),
        (errors.UnimplementedFeatureError.of("n"), 501, "server_error", {"x-should-retry": "false"}),
        (errors.DeadlinePassedError("late"), 504, "server_error", {"x-should-retry": "false"}),
        (errors.UnauthenticatedError("who?"), 401, "authentication_error", {"x-should-retry": "false"}),
        (errors.PermissionRefusedError("no"), 403, "permission_error", {"x-should-retry": "false"}),
        (errors.AdapterNotFoundError("no such"), 404, "not_found_error", {"x-should-retry": "false"}),
        (errors.AdapterRefusedError("dora"), 400, "invalid_request_error", {"x-should-retry": "false"}),
    ],
    ids=lambda value: value.reason if isinstance(value, errors.AloraServeError) else "",
)
def test_clients_are_told_whether_to_send_again(
    error: errors.AloraServeError, status: int, kind: str, headers: dict[str, str]
) -> None:
    failure = failure_of(error)
    assert (failure.status, failure.body["error"]["type"], failure.body["error"]["code"]) == (
        status,
        kind,
        error.reason,
    )
    assert headers.items() <= failure.headers.items()
    assert ("x-should-retry" in failure.headers) != ("retry-after" in failure.headers)


def test_paths_read_as_in_python() -> None:
    assert field_path(["messages", 0, "content"]) == "messages[0].content"
    assert field_path([]) == ""
    assert field_path(["x" * 1000, 1]) == f"{'x' * 60}[1]"
