"""Intervals cover, pairs are paired, thresholds bite, and what is saved is read back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alora_serve.cli.app import app
from alora_serve.errors import ConfigError
from alora_serve.evaluation.bootstrap import estimate, paired_difference
from alora_serve.evaluation.items import Item
from alora_serve.evaluation.report import (
    Evaluation,
    compared,
    load_evaluation,
    shortfalls,
    summed_up,
    to_json,
)
from alora_serve.evaluation.scores import accuracy


def answers(right: list[bool], *, probabilities: bool = True, start: int = 0) -> tuple[Item, ...]:
    return tuple(
        Item(
            f"i{start + i}",
            "even" if i % 2 == 0 else "odd",
            "yes",
            "yes" if is_right else "no",
            {"yes": 0.8, "no": 0.2} if probabilities else {},
            seconds=0.5,
            prompt_tokens=10,
            cached_tokens=4,
        )
        for i, is_right in enumerate(right)
    )


def evaluation(right: list[bool], adapter: str = "check", **arguments: bool | int) -> Evaluation:
    return Evaluation(adapter, ("yes", "no"), answers(right, **arguments))  # type: ignore[arg-type]


def drawn(share: float, count: int, seed: int) -> list[bool]:
    generator = random.Random(seed)
    return [generator.random() < share for _ in range(count)]


def test_the_interval_is_the_binomial_ones_width_and_repeats() -> None:
    items = answers([i < 160 for i in range(200)])
    found = estimate([items], accuracy, 1000)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.8 - 1.96 * (0.8 * 0.2 / 200) ** 0.5, abs=0.012)
    assert found.high == pytest.approx(0.8 + 1.96 * (0.8 * 0.2 / 200) ** 0.5, abs=0.012)
    assert estimate([items], accuracy, 1000) == found


def test_runs_that_err_elsewhere_make_a_surer_mean() -> None:
    runs = [answers([(i + shift) % 4 > 0 for i in range(200)]) for shift in range(4)]
    alone, together = (estimate(group, accuracy, 1000) for group in (runs[:1], runs))
    assert alone.value == together.value == 0.75
    assert alone.high - alone.low > 0.1
    assert together.high - together.low < 0.01


def test_pairs_are_surer_than_two_intervals() -> None:
    first = drawn(0.8, 300, 1)
    second = [right and i % 20 != 0 for i, right in enumerate(first)]  # wrong where the first is, and a little more
    difference = paired_difference([answers(first)], [answers(second)], accuracy, 1000)
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p_value < 0.01
    swapped = paired_difference([answers(second)], [answers(first)], accuracy, 1000)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-difference.value, -difference.high, -difference.low)
    )
    same = paired_difference([answers(first)], [answers(first)], accuracy, 1000)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_seeds_are_averaged_and_only_common_items_count() -> None:
    runs = [evaluation(drawn(0.9, 100, seed)) for seed in (1, 2, 3)]
    one = compared(runs, [evaluation(drawn(0.6, 120, 4), "other", start=20)])["accuracy"]
    mean = sum(accuracy(run.items[20:]) for run in runs) / 3
    other = evaluation(drawn(0.6, 120, 4), start=20)
    assert one.value == pytest.approx(mean - accuracy(other.items[:80]))
    with pytest.raises(ConfigError, match="no item in common"):
        compared(runs, [evaluation([True], start=500)])
    text = Evaluation("rewrite", (), answers([True] * 100))
    with pytest.raises(ConfigError, match="some of free text"):
        compared(runs, [text])


def test_a_report_sums_up() -> None:
    report = summed_up(evaluation([True, True, False, True]), resamples=50)
    assert report.metrics["accuracy"].value == 0.75
    assert set(report.metrics) == {"accuracy", "macro_f1", "ece"}
    assert report.by_source == {"even": (0.5, 2), "odd": (1.0, 2)}
    assert (report.majority, report.mean_seconds, report.mean_cached_tokens) == (1.0, 0.5, 4)
    assert len(report.reliability) == 2
    unread = Item("x", "even", "yes", "", form="none")
    partly = summed_up(Evaluation("check", ("yes", "no"), (*answers([True, True]), unread)), 50)
    assert partly.metrics["accuracy"].value == pytest.approx(2 / 3)
    assert partly.metrics["ece"].value == pytest.approx(0.2)
    assert (partly.failed, partly.mean_seconds, partly.mean_cached_tokens) == (1, 0.5, 4)
    nothing = summed_up(Evaluation("check", ("yes", "no"), (unread,)), 50)
    assert (nothing.failed, nothing.mean_seconds, set(nothing.metrics)) == (1, 0.0, {"accuracy", "macro_f1"})
    assert set(summed_up(evaluation([True, False], probabilities=False), 50).metrics) == {"accuracy", "macro_f1"}
    assert set(summed_up(Evaluation("r", (), answers([True])), 50).metrics) == {"rouge_l", "exact_match"}


def test_thresholds_are_least_values_but_for_calibration() -> None:
    report = summed_up(evaluation([True, True, False, True]), resamples=50)
    assert shortfalls(report, {"accuracy": 0.75, "ece": 0.5}) == []
    assert shortfalls(report, {"accuracy": 0.76}) == ["accuracy is 0.7500, below 0.76"]
    (missed,) = shortfalls(report, {"ece": 0.01})
    assert "above" in missed
    (missed,) = shortfalls(report, {"rouge_l": 0.5})
    assert missed == "rouge_l is not known of these answers, only accuracy, macro_f1, ece"


def save(path: Path, evaluated: Evaluation) -> str:
    path.write_text(json.dumps(to_json(evaluated, summed_up(evaluated, 50))))
    return str(path)


def test_what_is_saved_is_read_back_and_compared(tmp_path: Path) -> None:
    first, second = evaluation([True] * 30 + [False] * 10), evaluation([True] * 10 + [False] * 30, "other")
    files = [save(tmp_path / "a.json", first), "--against", save(tmp_path / "b.json", second)]
    assert load_evaluation(tmp_path / "a.json") == first
    result = CliRunner().invoke(app, ["compare", *files, "--resamples", "200", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["accuracy"]["value"] == 0.5
    shown = CliRunner().invoke(app, ["compare", *files, "--resamples", "200"])
    assert "+0.5000" in shown.stdout
    (tmp_path / "b.json").write_text("{}")
    refused = CliRunner().invoke(app, ["compare", *files])
    assert refused.exit_code == 1
    with pytest.raises(ConfigError, match="is no output of alora-serve eval"):
        load_evaluation(tmp_path / "b.json")
