"""Tables in Markdown: read in a terminal as they are, and pasted into the documentation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Final

from harness import Correct, Row

PREFILLS: Final[Mapping[str, tuple[str, int]]] = {"prefill, tokens/s": ("prefill_tokens_per_second", 0)}
"""A further column, of rows that know it."""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[str] = ()) -> str:
    """A table. Columns hold figures, set right, but for those of ``words``."""
    cells = [columns, *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width + 2) if column in words else f"{'-' * (width + 1)}:"
        for column, width in zip(columns, widths, strict=True)
    )
    return "\n".join([line(columns), f"|{'|'.join(rule)}|", *map(line, rows)])


def figure(values: Sequence[float], digits: int = 3) -> str:
    """The median and, of several, the smallest and the largest."""
    if not values:
        return ""
    middle = f"{median(values):,.{digits}f}"
    return f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})" if len(values) > 1 else middle


def as_peft(correct: Correct | None) -> str:
    """How many answers are those of stock PEFT run cold; empty where none was compared."""
    return f"{correct.equal} of {correct.of}" if correct else ""


def rows_table(
    rows: Sequence[Row],
    *,
    baseline: str,
    by: str = "first_token_seconds",
    details: Mapping[str, tuple[str, int]] | None = None,
) -> str:
    """Rows with medians and spread in seconds; the last column says how many times faster than ``baseline``.

    Args:
        baseline: the system that others are compared with, asked the same.
        by: the figure that decides that.
        details: further columns: a heading, the figure's name among a row's details, and its decimals.
    """
    more = details or {}
    asked = any(row.what for row in rows)
    fetched = any(row.fetched_bytes for row in rows)
    columns = ["tokens", *(["asked"] if asked else []), "system", "first token", "end to end"]
    columns += [*(["fetched"] if fetched else []), *more, "as PEFT", *(["times faster"] if baseline else [])]

    def cells(row: Row) -> list[str]:
        found = [f"{row.prompt_tokens:,}", *([row.what] if asked else []), row.system]
        found += [figure([getattr(sample, what) for sample in row.samples]) for what in _SECONDS]
        if fetched:
            found.append(f"{row.fetched_bytes / 1e6:.1f} MB" if row.fetched_bytes else "")
        found += [figure(_several(row.details.get(name, ())), digits) for name, digits in more.values()]
        found.append(as_peft(row.correct))
        if baseline:
            found.append(_times_faster(row, rows, baseline, by))
        return found

    return markdown(columns, [cells(row) for row in rows], words=("asked", "system"))


_SECONDS = ("first_token_seconds", "total_seconds")


def _times_faster(row: Row, rows: Sequence[Row], baseline: str, by: str) -> str:
    same = (r for r in rows if (r.system, r.prompt_tokens, r.what) == (baseline, row.prompt_tokens, row.what))
    slow = next(same, None)
    return f"{slow.median(by) / row.median(by):.1f}x" if slow else ""


def _several(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, Sequence) else (value,)
