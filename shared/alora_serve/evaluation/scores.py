"""Figures of a list of items, as scikit-learn and rouge-score define them. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from alora_serve.evaluation.items import Item

ECE_BINS: Final = 15
Bin = tuple[int, float, float]
"""Of forecasts that are about alike: how many, their sum, and how many came true. Empty ones are left out."""
_WORD: Final = re.compile(r"[a-z0-9]+")
_ANY_WORD: Final = re.compile(r"[^\W_]+")


def accuracy(items: Sequence[Item]) -> float:
    """Share of right predictions."""
    return sum(item.is_right for item in items) / len(items)


def macro_f1(items: Sequence[Item]) -> float:
    """Mean over all labels that occur, as target or prediction, of their F1."""
    right = Counter(item.target for item in items if item.is_right)
    wanted, said = Counter(item.target for item in items), Counter(item.prediction for item in items)
    labels = wanted.keys() | said.keys()
    return sum(2 * right[label] / (wanted[label] + said[label]) for label in labels) / len(labels)


def expected_calibration_error(items: Sequence[Item]) -> float:
    """Mean distance between confidence and accuracy over 15 bins of equal width, weighed by their items; 0 of none."""
    return calibration_error(reliability(items))


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between forecasts and what came true, weighed by the forecasts of each bin; 0 of none."""
    weighed = sum(count for count, _, _ in bins)
    return sum(abs(forecasts - came_true) for _, forecasts, came_true in bins) / weighed if weighed else 0.0


def reliability(items: Sequence[Item]) -> list[Bin]:
    """How sure the predictions were, whatever they said, and how many were right.

    Items without probabilities are in no bin: how sure an answer was that could not be read, nobody knows.
    """
    return _binned((item.confidence, item.is_right) for item in items if item.probabilities)


def label_reliability(items: Sequence[Item], label: str) -> list[Bin]:
    """How likely ``label`` was said to be, and how often it was the right answer."""
    return _binned((item.probabilities.get(label, 0.0), item.target == label) for item in items if item.probabilities)


def _binned(forecasts: Iterable[tuple[float, bool]]) -> list[Bin]:
    counts, sums, came_true = [0] * ECE_BINS, [0.0] * ECE_BINS, [0] * ECE_BINS
    for forecast, is_true in forecasts:
        # A bin holds its upper edge, as is usual for this measure.
        index = max(0, min(ECE_BINS - 1, -int(-forecast * ECE_BINS // 1) - 1))
        counts[index] += 1
        sums[index] += forecast
        came_true[index] += is_true
    return [bin_ for bin_ in zip(counts, sums, map(float, came_true), strict=True) if bin_[0]]


def rouge_l(items: Sequence[Item]) -> float:
    """Mean F-measure of the longest common subsequence of words between prediction and target."""
    return sum(rouge_l_of(item.prediction, item.target) for item in items) / len(items)


@lru_cache(maxsize=1 << 16)  # a bootstrap asks for the same pairs a thousand times
def rouge_l_of(prediction: str, target: str) -> float:
    """ROUGE-L F-measure of two texts, without stemming."""
    said, wanted = _WORD.findall(prediction.lower()), _WORD.findall(target.lower())
    common = _common_subsequence(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def exact_match(items: Sequence[Item]) -> float:
    """Share of predictions whose words, in whatever script, are those of the target."""
    return sum(_words(item.prediction) == _words(item.target) for item in items) / len(items)


def _words(text: str) -> list[str]:
    return _ANY_WORD.findall(text.lower())


def majority(items: Sequence[Item]) -> float:
    """Accuracy of always saying the most frequent target."""
    return max(Counter(item.target for item in items).values()) / len(items)
