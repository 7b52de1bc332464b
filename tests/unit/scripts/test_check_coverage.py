"""The coverage gate: a total, a minimum for each file, and no empty report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def report(total: float, **files: float) -> dict[str, Any]:
    return {
        "totals": {"percent_covered": total},
        "files": {f"{name}.py": {"summary": {"percent_covered": percent}} for name, percent in files.items()},
    }


@pytest.fixture
def gate(load_script: Any) -> Any:
    return load_script("check_coverage")


def test_minima_reached_exactly_pass(gate: Any) -> None:
    assert gate.find_shortfalls(report(85.0, a=70.0), 85, 70) == []


def test_a_low_file_fails_under_a_high_total_and_the_worst_comes_first(gate: Any) -> None:
    shortfalls = gate.find_shortfalls(report(95.0, good=99.0, bad=69.9, worse=10.0), 85, 70)
    assert shortfalls == ["worse.py: 10.0 % < 70 %", "bad.py: 69.9 % < 70 %"]


def test_a_low_total_fails_though_every_file_passes(gate: Any) -> None:
    assert gate.find_shortfalls(report(84.9, a=80.0), 85, 70) == ["all files: 84.9 % < 85 %"]


@pytest.mark.parametrize(("content", "status"), [(report(90, a=90), 0), (report(90, a=1), 1), (report(100), 1)])
def test_exit_status(gate: Any, tmp_path: Path, content: dict[str, Any], status: int) -> None:
    file = tmp_path / "coverage.json"
    file.write_text(json.dumps(content))
    assert gate.main([str(file), "--total", "85", "--file", "70"]) == status
