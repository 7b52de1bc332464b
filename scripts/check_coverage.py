"""Fails when branch coverage is below a minimum, over all files or in any single one.

Reads the report of ``coverage json``; ``coverage report --fail-under`` knows only the total.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def find_shortfalls(report: dict[str, Any], minimum_total: float, minimum_file: float) -> list[str]:
    """One line for each minimum missed, the worst file first. Percentages count lines and branches together."""
    total = report["totals"]["percent_covered"]
    shortfalls = [f"all files: {total:.1f} % < {minimum_total:g} %"] if total < minimum_total else []
    percentages = ((details["summary"]["percent_covered"], name) for name, details in report["files"].items())
    for percentage, name in sorted(percentages):
        if percentage < minimum_file:
            shortfalls.append(f"{name}: {percentage:.1f} % < {minimum_file:g} %")
    return shortfalls


def main(arguments: list[str] | None = None) -> int:
    """Print the total and every shortfall; 0 if there is none, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--total", type=float, required=True, help="percent over all files")
    parser.add_argument("--file", type=float, required=True, help="percent in each file")
    options = parser.parse_args(arguments)
    report = json.loads(options.report.read_text())
    if not report["files"]:
        print(f"{options.report} covers no file", file=sys.stderr)
        return 1
    shortfalls = find_shortfalls(report, options.total, options.file)
    print(f"coverage: {report['totals']['percent_covered']:.1f} % of {len(report['files'])} files, lines and branches")
    for shortfall in shortfalls:
        print(f"coverage too low: {shortfall}", file=sys.stderr)
    return 1 if shortfalls else 0


if __name__ == "__main__":
    sys.exit(main())
