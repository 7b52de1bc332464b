from __future__ import annotations

import enum
import json
from dataclasses import dataclass

import pytest
import typer

from alora_serve.cli.output import errors_reported, print_json, print_table, to_json
from alora_serve.errors import FieldViolation, InvalidRequestError, OverloadedError


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Thing:
    colour: Colour
    digest: bytes
    counts: dict[str, int]
    parts: tuple[object, ...]


def test_domain_objects_become_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(Thing(Colour.RED, b"\x0f", {"a": 1}, (None, [True], "ö")))
    assert capsys.readouterr().out == (
        '{"colour": "red", "digest": "0f", "counts": {"a": 1}, "parts": [null, [true], "ö"]}\n'
    )
    assert to_json({1: Colour.RED}) == {"1": "red"}


def test_an_error_is_told_with_its_violations_its_retry_and_its_request(capsys: pytest.CaptureFixture[str]) -> None:
    violations = [FieldViolation("a", "is bad"), FieldViolation("b", "is worse")]
    with pytest.raises(typer.Exit) as ended, errors_reported(as_json=False):
        raise InvalidRequestError("a: is bad", violations=violations, metadata={"request_id": "r-1"})
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: a: is bad\n  b: is worse\n  request id r-1\n"
    with pytest.raises(typer.Exit), errors_reported(as_json=False):
        raise OverloadedError("queue is full", retry_after_seconds=1.5)
    assert capsys.readouterr().err == "error: queue is full\n  retry in 1.5 s\n"


def test_for_machines_an_error_is_an_object_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), errors_reported(as_json=True):
        raise InvalidRequestError.of("a", "is bad")
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "status": "INVALID_ARGUMENT",
            "reason": "REQUEST_INVALID",
            "message": "a: is bad",
            "violations": [{"field": "a", "description": "is bad"}],
            "retry_after_seconds": None,
            "metadata": {},
        }
    }


def test_ctrl_c_ends_quietly_and_a_bug_loudly() -> None:
    with pytest.raises(typer.Exit) as ended, errors_reported(as_json=False):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    with pytest.raises(ZeroDivisionError), errors_reported(as_json=False):
        raise ZeroDivisionError


def test_a_table_never_folds_what_its_rows_are_about(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_table("things", [{"name": "a-name-of-thirty-characters-ok", "count": 5, "about": "wordswords" * 20}])
    told = capsys.readouterr().out
    assert "a-name-of-thirty-characters-ok" in told
    assert told.startswith("things")
    print_table("nothing", [])
