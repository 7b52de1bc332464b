"""What an evaluation came to, as people read it and as machines store it; and how two compare. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from alora_serve.errors import ConfigError
from alora_serve.evaluation.bootstrap import Difference, Estimate, Score, estimate, paired_difference
from alora_serve.evaluation.items import Item
from alora_serve.evaluation.scores import (
    accuracy,
    exact_match,
    expected_calibration_error,
    macro_f1,
    majority,
    reliability,
    rouge_l,
)

LABEL_SCORES: Final[Mapping[str, Score]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "ece": expected_calibration_error,
}
TEXT_SCORES: Final[Mapping[str, Score]] = {"rouge_l": rouge_l, "exact_match": exact_match}
LOWER_IS_BETTER: Final = frozenset({"ece"})
SCORES: Final[Mapping[str, Score]] = {**LABEL_SCORES, **TEXT_SCORES}
RESAMPLES: Final = 1000


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One adapter, or the base model, on one test set.

    Attributes:
        adapter: its name; empty for the base model.
        labels: the possible answers; empty for free text.
        items: in the order of the test set.
    """

    adapter: str
    labels: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def scores(self) -> Mapping[str, Score]:
        """Which figures make sense for it. Without probabilities there is no calibration."""
        if not self.labels:
            return TEXT_SCORES
        known = any(item.probabilities for item in self.items)
        return {name: score for name, score in LABEL_SCORES.items() if known or name != "ece"}


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation, summed up.

    Attributes:
        metrics: by name.
        majority: accuracy of the most frequent label; None for free text.
        by_source: accuracy or ROUGE-L of each source, and its number of items.
        reliability: items, mean confidence and accuracy of each bin of confidence.
        failed: items whose answer could not be read: wrong, and not part of calibration nor of the means below.
        mean_seconds: of a call, as the router measured; ``mean_first_token_seconds`` until its first token.
        mean_prompt_tokens: of a call; ``mean_cached_tokens`` of them came from kept KV.
    """

    adapter: str
    items: int
    metrics: Mapping[str, Estimate]
    majority: float | None
    by_source: Mapping[str, tuple[float, int]]
    reliability: Sequence[tuple[int, float, float]]
    failed: int
    mean_seconds: float
    mean_first_token_seconds: float
    mean_prompt_tokens: float
    mean_cached_tokens: float


def summed_up(evaluation: Evaluation, resamples: int = RESAMPLES) -> Report:
    """The figures of an evaluation."""
    items, scores = evaluation.items, evaluation.scores
    main = next(iter(scores.values()))
    sources = sorted({item.source for item in items})
    parts = {source: [item for item in items if item.source == source] for source in sources}

    read = [item for item in items if item.form != "none"]

    def mean(field: str) -> float:
        return sum(float(getattr(item, field)) for item in read) / max(1, len(read))

    return Report(
        adapter=evaluation.adapter,
        items=len(items),
        metrics={name: estimate([items], score, resamples) for name, score in scores.items()},
        majority=majority(items) if evaluation.labels else None,
        by_source={source: (main(part), len(part)) for source, part in parts.items()},
        reliability=[(n, c / n, r / n) for n, c, r in reliability(items)] if "ece" in scores else [],
        failed=len(items) - len(read),
        mean_seconds=mean("seconds"),
        mean_first_token_seconds=mean("first_token_seconds"),
        mean_prompt_tokens=mean("prompt_tokens"),
        mean_cached_tokens=mean("cached_tokens"),
    )


def shortfalls(report: Report, thresholds: Mapping[str, float]) -> list[str]:
    """Which thresholds are missed, in words. One for ``ece`` is a most, the others are a least.

    One for a figure that these answers do not have is missed.
    """
    missed = []
    for name, bound in thresholds.items():
        if name not in report.metrics:
            missed.append(f"{name} is not known of these answers, only {', '.join(report.metrics)}")
            continue
        value = report.metrics[name].value
        if value > bound if name in LOWER_IS_BETTER else value < bound:
            missed.append(f"{name} is {value:.4f}, {'above' if name in LOWER_IS_BETTER else 'below'} {bound:g}")
    return missed


def to_json(evaluation: Evaluation, report: Report) -> dict[str, Any]:
    """Everything, for machines and for :func:`load_evaluation`."""
    return {**asdict(report), "labels": list(evaluation.labels), "answers": [asdict(item) for item in evaluation.items]}


def load_evaluation(path: Path) -> Evaluation:
    """What ``alora-serve eval --json`` printed.

    Raises:
        ConfigError: the file cannot be read as such.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Evaluation(stored["adapter"], tuple(stored["labels"]), tuple(Item(**item) for item in stored["answers"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no output of alora-serve eval --json: {error!r}") from error


def compared(
    first: Sequence[Evaluation], second: Sequence[Evaluation], resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """The difference of each figure that all have, first minus second, over the items that all answered.

    Raises:
        ConfigError: they have no item in common, or answer different kinds of question.
    """
    runs = [*first, *second]
    common = set.intersection(*({item.item_id for item in run.items} for run in runs))
    if not common:
        raise ConfigError("the evaluations have no item in common: compare such of one test set")
    names = [name for name in SCORES if all(name in run.scores for run in runs)]
    if not names:
        raise ConfigError("some of the evaluations are of labels and some of free text")
    order = [item.item_id for item in runs[0].items if item.item_id in common]

    def paired(group: Sequence[Evaluation]) -> list[list[Item]]:
        by_id = [{item.item_id: item for item in run.items} for run in group]
        return [[items[item_id] for item_id in order] for items in by_id]

    return {name: paired_difference(paired(first), paired(second), SCORES[name], resamples) for name in names}
