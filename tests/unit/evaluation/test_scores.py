"""Figures are those of scikit-learn and rouge-score, recorded in ``reference.json``; calibration by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.evaluation.items import Item
from alora_serve.evaluation.scores import (
    ECE_BINS,
    accuracy,
    calibration_error,
    exact_match,
    expected_calibration_error,
    label_reliability,
    macro_f1,
    majority,
    reliability,
    rouge_l,
    rouge_l_of,
)

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("reference.json").read_text(encoding="utf-8"))


def item(target: str, prediction: str, probability: float | None = None, item_id: str = "a") -> Item:
    probabilities = {} if probability is None else {prediction: probability}
    return Item(item_id, "", target, prediction, probabilities)


@pytest.mark.parametrize("case", REFERENCE["labels"])
def test_accuracy_and_macro_f1_are_scikit_learns(case: dict[str, Any]) -> None:
    items = [item(t, p) for t, p in zip(case["targets"], case["predictions"], strict=True)]
    assert accuracy(items) == pytest.approx(case["accuracy"])
    assert macro_f1(items) == pytest.approx(case["macro_f1"])


def test_rouge_l_is_rouge_scores() -> None:
    for prediction, target, expected in REFERENCE["rouge_l"]:
        assert rouge_l_of(prediction, target) == pytest.approx(expected), (prediction, target)
    items = [item(target, prediction) for prediction, target, _ in REFERENCE["rouge_l"]]
    mean = sum(expected for *_, expected in REFERENCE["rouge_l"]) / len(items)
    assert rouge_l(items) == pytest.approx(mean)


def test_calibration_error_is_the_weighed_distance_of_each_bin() -> None:
    sure = [item("yes", "yes", 0.9) for _ in range(6)] + [item("no", "yes", 0.9) for _ in range(2)]
    unsure = [item("yes", "no", 0.55), item("no", "no", 0.55)]
    expected = (8 * abs(0.9 - 6 / 8) + 2 * abs(0.55 - 0.5)) / 10
    assert expected_calibration_error(sure + unsure) == pytest.approx(expected)
    assert [(n, c / n, r / n) for n, c, r in reliability(sure + unsure)] == [
        (2, pytest.approx(0.55), 0.5),
        (8, pytest.approx(0.9), 0.75),
    ]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_bins_hold_every_item_once_and_the_error_is_at_most_one(drawn: list[tuple[float, bool]]) -> None:
    items = [item("yes", "yes" if right else "no", probability) for probability, right in drawn]
    bins = reliability(items)
    assert sum(count for count, _, _ in bins) == len(items)
    assert len(bins) <= ECE_BINS
    for count, confidence, _ in bins:
        low, high = math.floor(confidence / count * ECE_BINS - 1e-9), math.ceil(confidence / count * ECE_BINS + 1e-9)
        assert high - low <= 2
    assert 0 <= expected_calibration_error(items) <= 1


@pytest.mark.parametrize(("probability", "bin_edge"), [(0.0, 1), (1 / 15, 1), (0.0667, 2), (1.0, 15), (0.999, 15)])
def test_a_bin_holds_its_upper_edge(probability: float, bin_edge: int) -> None:
    edge = [item("yes", "yes", probability), item("yes", "yes", (bin_edge - 0.5) / 15)]
    assert len(reliability(edge)) == 1


def test_of_a_label_it_counts_how_often_that_was_the_right_answer() -> None:
    said = [Item("a", "", target, "no", {"yes": 0.3, "no": 0.7}) for target in ("yes", "no", "no", "no")]
    said.append(Item("b", "", "yes", "yes", {"yes": 0.9, "no": 0.1}))
    assert [(n, p / n, t / n) for n, p, t in label_reliability(said, "yes")] == [
        (4, pytest.approx(0.3), 0.25),
        (1, pytest.approx(0.9), 1.0),
    ]
    assert calibration_error(label_reliability(said, "yes")) == pytest.approx((4 * 0.05 + 0.1) / 5)
    assert label_reliability([item("yes", "")], "yes") == []


def test_an_item_without_probabilities_is_in_no_bin() -> None:
    sure = [item("yes", "yes", 0.9), item("yes", "no", 0.9)]
    assert reliability([*sure, item("yes", "")]) == reliability(sure)
    assert expected_calibration_error([*sure, item("yes", "")]) == pytest.approx(0.4)
    assert expected_calibration_error([item("yes", "")]) == 0.0


def test_small_figures() -> None:
    items = [item("What is it?", "what is it"), item("a b", "b a"), item("a b", "a b")]
    assert exact_match(items) == pytest.approx(2 / 3)
    assert exact_match([item("Что это?", "что это"), item("Что это?", "кто там"), item("café", "caf")]) == 1 / 3
    assert majority(items) == pytest.approx(2 / 3)
    assert item("yes", "yes").confidence == 1.0
    assert Item("a", "", "yes", "junk", {"yes": 0.7, "no": 0.3}).confidence == 0.0
