"""Every line of a process is one record on standard error, named, and free of what people asked."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import logging, sys
import structlog
from opentelemetry import trace
from alora_serve.logging import configure_logging

configure_logging("probe", level=sys.argv[1], log_format=sys.argv[2])
log = structlog.get_logger("x")

def answer(prompt):
    raise ValueError("no answer")

def catch(report):
    try:
        answer("my secret diary")
    except ValueError:
        report("failed")

parent = trace.NonRecordingSpan(trace.SpanContext(0xA1, 0xB2, is_remote=False))
with structlog.contextvars.bound_contextvars(request_id="id-1"), trace.use_span(parent):
    log.info("ours", tokens=3)
    logging.getLogger("somebody.else").warning("theirs %s", "too")
log.debug("detail")
catch(log.exception)
catch(logging.getLogger("somebody.else").exception)
"""


def run(level: str, log_format: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, level, log_format], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == "", "standard output is for what supervisors parse"
    return ran.stderr


def records(level: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(level, "json").splitlines()]


def test_json_lines_carry_service_level_time_request_and_trace_whoever_logs() -> None:
    ours, theirs, *_ = records("info")
    assert (ours["event"], ours["tokens"], ours["level"]) == ("ours", 3, "info")
    assert (theirs["event"], theirs["level"]) == ("theirs too", "warning")
    for record in (ours, theirs):
        assert record["service"] == "probe"
        assert record["request_id"] == "id-1"
        assert (record["trace_id"], record["span_id"]) == (f"{0xA1:032x}", f"{0xB2:016x}")
        assert record["timestamp"].endswith("Z")


def test_request_and_trace_end_with_the_request() -> None:
    assert not any(record.keys() & {"request_id", "trace_id", "span_id"} for record in records("info")[2:])


def test_the_level_is_the_least_that_is_shown() -> None:
    def events(level: str) -> list[str]:
        return [record["event"] for record in records(level)]

    assert events("debug") == ["ours", "theirs too", "detail", "failed", "failed"]
    assert events("info") == ["ours", "theirs too", "failed", "failed"]
    assert events("error") == ["failed", "failed"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_the_way_but_no_variables(log_format: str) -> None:
    shown = run("info", log_format)
    assert shown.count("no answer") == 2
    assert "answer" in shown
    assert "diary" not in shown.replace('answer("my secret diary")', "")


def test_console_lines_are_for_people() -> None:
    first = run("info", "console").splitlines()[0]
    assert "ours" in first
    assert "request_id=id-1" in first
    assert "\x1b" not in first, "colours are for terminals"
