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


def estimate(items: Sequence[Item], score: Score, resamples: int, seed: int = 0) -> Estimate:
    """``score`` of the items, and the interval of it over resampled items."""
    drawn = sorted(score([items[i] for i in draw]) for draw in _draws(len(items), resamples, seed))
    return Estimate(score(items), *_middle(drawn))


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
        means = [sum(score([run[i] for i in draw]) for run in runs) / len(runs) for runs in (first, second)]
        return means[0] - means[1]

    count = len(first[0])
    drawn = sorted(difference(draw) for draw in _draws(count, resamples, seed))
    below, above = sum(d <= 0 for d in drawn), sum(d >= 0 for d in drawn)
    p_value = min(1.0, 2 * min(below, above) / len(drawn))
    return Difference(difference(range(count)), *_middle(drawn), p_value)


def _draws(count: int, resamples: int, seed: int) -> Iterator[list[int]]:
    generator = random.Random(seed)
    for _ in range(resamples):
        yield generator.choices(range(count), k=count)


def _middle(drawn: Sequence[float]) -> tuple[float, float]:
    edge = int(0.025 * len(drawn))
    return drawn[edge], drawn[-1 - edge]
