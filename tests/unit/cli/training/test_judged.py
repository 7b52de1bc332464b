"""What `eval` reads and shows; the commands themselves are in tests/integration/test_evaluation.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from alora_serve.cli.training.judged import (
    parse_thresholds,
    progress,
    read_test_rows,
    show_differences,
    show_report,
    write,
)
from alora_serve.errors import ConfigError
from alora_serve.evaluation.items import Item
from alora_serve.evaluation.report import Evaluation, compared, summed_up

LABELS = ("yes", "no")


def item(number: int, source: str, prediction: str, *, form: str = "label") -> Item:
    sure = {prediction: 0.8} if form == "label" else {}
    return Item(f"r{number}", source, "yes", prediction, probabilities=sure, seconds=0.5, form=form)


ITEMS = (item(0, "a", "yes"), item(1, "a", "no"), item(2, "b", "yes"), item(3, "b", "", form="none"))


def rows_file(path: Path, ids: Sequence[str]) -> Path:
    rows = [{"id": i, "messages": [{"role": "user", "content": i}], "target": "yes"} for i in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bounds_are_metrics_with_values() -> None:
    assert parse_thresholds(["accuracy=0.9", "ece=.1"]) == {"accuracy": 0.9, "ece": 0.1}
    for wrong in ("accuracy", "accuracy=high"):
        with pytest.raises(ConfigError, match=f"--threshold {wrong} is not METRIC=VALUE"):
            parse_thresholds([wrong])
    for endless in ("nan", "inf", "-inf"):
        with pytest.raises(ConfigError, match=f"accuracy={endless}: {endless} is no bound"):
            parse_thresholds([f"accuracy={endless}"])
    with pytest.raises(ConfigError, match="acuracy=1: there is no such figure, only accuracy, macro_f1, ece, rouge_l"):
        parse_thresholds(["ece=0.1", "acuracy=1"])


def test_rows_of_all_files_are_read_up_to_the_limit(tmp_path: Path) -> None:
    files = [rows_file(tmp_path / "one.jsonl", "ab"), rows_file(tmp_path / "two.jsonl", "cd")]
    assert [row.row_id for row in read_test_rows(files, None)] == ["a", "b", "c", "d"]
    assert [row.row_id for row in read_test_rows(files, 3)] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="two rows have the id a"):
        read_test_rows([*files, files[0]], None)
    with pytest.raises(ConfigError, match=r"no rows in .*empty\.jsonl"):
        read_test_rows([rows_file(tmp_path / "empty.jsonl", "")], None)


def test_what_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    write(tmp_path / "found.json", {"adapter": "größer"})
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == {"adapter": "größer"}
    with pytest.raises(ConfigError, match="cannot write"):
        write(tmp_path / "missing" / "found.json", {})


def test_people_see_figures_by_source_and_what_could_not_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(summed_up(Evaluation("guard", LABELS, ITEMS), resamples=20))
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "guard, 4 items",
        "│ accuracy │ 0.5000 │",
        "always the most frequent answer: accuracy 1.0000",
        "│ a │ 0.5000 │ 2 │",
        "1 answers could not be read",
        "a call: 0.500 s",
    ):
        assert part in told, part
    show_report(summed_up(Evaluation("", LABELS, ITEMS[:2]), resamples=20))
    told = capsys.readouterr().out
    assert "base model, 2 items" in told
    assert "could not be read" not in told
    assert "source" not in told, "there is one only"


def test_people_see_differences_with_their_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    better = [Evaluation("new", LABELS, tuple(item(number, "a", "yes") for number in range(4)))]
    show_differences(compared(better, [Evaluation("old", LABELS, ITEMS)], resamples=20))
    told = capsys.readouterr().out
    assert "+0.5000" in told
    assert "accuracy" in told


def test_a_bar_counts_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(2) as answered:
        for each in ITEMS[:2]:
            answered(each)
    told = capsys.readouterr().err
    assert "asking" in told
    assert "2/2" in told
