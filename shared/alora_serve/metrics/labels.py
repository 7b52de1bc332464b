"""Values of labels: those that the code knows are there from the start, those that people choose are bounded."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, Final, Generic, TypeVar

from prometheus_client.metrics import MetricWrapperBase

MAX_LABEL_VALUES: Final = 200
"""Distinct adapters a label may name; later ones count as ``other``."""

ValueT = TypeVar("ValueT")


def create_series(metric: MetricWrapperBase, *values: Iterable[str]) -> None:
    """Every combination of these values of a metric's labels, in the order of the labels, at 0."""
    for combination in product(*values):
        metric.labels(*combination)


class LabelCap(Generic[ValueT]):
    """Bounds the values of labels that people choose, over the life of a process: a series once made is kept by others.

    Args:
        other: stands for what is beyond the limit.
        limit: distinct values that are told apart.
    """

    def __init__(self, other: ValueT, limit: int = MAX_LABEL_VALUES) -> None:
        self._other = other
        self._limit = limit
        self._seen: set[Any] = set()

    def __call__(self, value: ValueT) -> ValueT:
        """``value``, or ``other`` once the limit of distinct values is reached."""
        if value in self._seen or len(self._seen) < self._limit:
            self._seen.add(value)
            return value
        return self._other
