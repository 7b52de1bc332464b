from __future__ import annotations

import pytest
from harness import Correct, Row, Sample
from tables import PREFILLS, as_peft, figure, markdown, rows_table


def row(system: str, *total_seconds: float, what: str = "", correct: Correct | None = None) -> Row:
    samples = tuple(Sample(total / 4, total) for total in total_seconds)
    return Row(system, 2048, samples, what=what, correct=correct)


def cells(table: str) -> list[list[str]]:
    """Of a Markdown table, its rule left out."""
    head, _, *rows = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]


def test_a_table_is_markdown_with_figures_set_right() -> None:
    assert markdown(("system", "seconds"), [("ours", "1.0"), ("theirs", "12.5")], words=("system",)).splitlines() == [
        "| system | seconds |",
        "|--------|--------:|",
        "| ours   |     1.0 |",
        "| theirs |    12.5 |",
    ]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([3.0, 1.0, 2.0], "2.0 (1.0-3.0)"), ([2.0], "2.0"), ([], ""), ([4321.0, 1.0], "2,161.0 (1.0-4,321.0)")],
)
def test_a_figure_is_the_median_and_the_spread_of_several(values: list[float], shown: str) -> None:
    assert figure(values, 1) == shown


def test_rows_are_compared_with_the_baseline_asked_the_same() -> None:
    rows = [
        row("slow", 8.0, what="1"),
        row("fast", 2.0, what="1"),
        row("slow", 30.0, what="5"),
        row("fast", 2.0, what="5"),
    ]

    head, *found = cells(rows_table(rows, baseline="slow", by="total_seconds"))

    assert head == ["tokens", "asked", "system", "first token", "end to end", "as PEFT", "times faster"]
    assert [line[-1] for line in found if line[2] == "fast"] == ["4.0x", "15.0x"]


def test_every_table_of_rows_says_how_many_answers_are_pefts() -> None:
    rows = [row("ours", 1.0, 3.0, correct=Correct(5, 5, "float32")), row("theirs", 1.0)]

    head, ours, theirs = cells(rows_table(rows, baseline=""))

    assert head == ["tokens", "system", "first token", "end to end", "as PEFT"]
    assert ours == ["2,048", "ours", "0.500 (0.250-0.750)", "2.000 (1.000-3.000)", "5 of 5"]
    assert theirs[-1] == as_peft(None) == ""


def test_further_columns_are_details_of_a_row() -> None:
    details = {"prefill_tokens_per_second": [900.0, 1100.0]}
    rows = [Row("ours", 2048, (Sample(0.1, 1.0),), 93_000_000, details=details), row("theirs", 1.0)]

    head, ours, theirs = cells(rows_table(rows, baseline="", details=PREFILLS))

    assert head[4:6] == ["fetched", "prefill, tokens/s"]
    assert ours[4:6] == ["93.0 MB", "1,000 (900-1,100)"]
    assert theirs[4:6] == ["", ""]
