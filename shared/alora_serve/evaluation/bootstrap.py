"""How sure a figure is: percentile bootstrap over items, plain and paired. Pure, and repeatable by its seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from alora_serve.evaluation.items import Item

Score = Callable[[Sequence[Item]], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(runs: Sequence[Sequence[Item]], score: Score, resamples: int, seed: int = 0) -> Estimate:
    """Mean ``score`` of the runs (seeds, say, each with the same items in the same order), over resampled items."""
    count = len(runs[0])
    drawn = sorted(_mean_score(runs, score, draw) for draw in _draws(count, resamples, seed))
    return Estimate(_mean_score(runs, score, range(count)), *_middle(drawn))


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second, its 95 % interval, and how likely a resample turns its sign: twice the smaller tail."""

    value: float
    low: float
    high: float
    p_value: float


def paired_difference(
    first: Sequence[Sequence[Item]], second: Sequence[Sequence[Item]], score: Score, resamples: int, seed: int = 0
) -> Difference:
    """Mean score of the first runs minus that of the second, resampling the items that all of them answered alike.

    Args:
        first: runs (seeds, say), each with the same items in the same order.
        second: the others, with those items too.
        score: of one run.
        resamples: how many.
        seed: of the draws.
    """

    def difference(draw: Sequence[int]) -> float:
        return _mean_score(first, score, draw) - _mean_score(second, score, draw)

    count = len(first[0])
    drawn = sorted(difference(draw) for draw in _draws(count, resamples, seed))
    below, above = sum(d <= 0 for d in drawn), sum(d >= 0 for d in drawn)
    p_value = min(1.0, 2 * min(below, above) / len(drawn))
    return Difference(difference(range(count)), *_middle(drawn), p_value)


def _mean_score(runs: Sequence[Sequence[Item]], score: Score, draw: Sequence[int]) -> float:
    return sum(score([run[i] for i in draw]) for run in runs) / len(runs)


def _draws(count: int, resamples: int, seed: int) -> Iterator[list[int]]:
    generator = random.Random(seed)
    for _ in range(resamples):
        yield generator.choices(range(count), k=count)


def _middle(drawn: Sequence[float]) -> tuple[float, float]:
    edge = int(0.025 * len(drawn))
    return drawn[edge], drawn[-1 - edge]
