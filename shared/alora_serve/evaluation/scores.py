"""Figures of a list of items, as scikit-learn and rouge-score define them. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from alora_serve.evaluation.items import Item

ECE_BINS: Final = 15
_WORD: Final = re.compile(r"[a-z0-9]+")


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
    bins = reliability(items)
    weighed = sum(count for count, _, _ in bins)
    return sum(abs(confidences - right) for _, confidences, right in bins) / weighed if weighed else 0.0


def reliability(items: Sequence[Item]) -> list[tuple[int, float, float]]:
    """For each bin that is not empty: items, summed confidence, right predictions; in order of confidence.

    Items without probabilities are in none: how sure an answer was that could not be read, nobody knows.
    """
    counts, confidences, right = [0] * ECE_BINS, [0.0] * ECE_BINS, [0] * ECE_BINS
    for item in (item for item in items if item.probabilities):
        # A bin holds its upper edge, as is usual for this measure.
        index = max(0, min(ECE_BINS - 1, -int(-item.confidence * ECE_BINS // 1) - 1))
        counts[index] += 1
        confidences[index] += item.confidence
        right[index] += item.is_right
    return [bin_ for bin_ in zip(counts, confidences, map(float, right), strict=True) if bin_[0]]


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
    """Share of predictions whose words are those of the target."""
    return sum(_WORD.findall(i.prediction.lower()) == _WORD.findall(i.target.lower()) for i in items) / len(items)


def majority(items: Sequence[Item]) -> float:
    """Accuracy of always saying the most frequent target."""
    return max(Counter(item.target for item in items).values()) / len(items)
