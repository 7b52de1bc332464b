"""The bars: which ratio of which figures, and what it must be. Pure; ``measure_bars.py`` measures.

A bar *holds* if its ratio meets the limit and it *counts*. Nothing counts in a run in which an answer of ours was not
stock PEFT's. A ratio of our own figures proves nothing if its denominator is slow, so it counts only where every limit
against llama-server is met, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final, Literal

Samples = Mapping[str, Sequence[float]]
"""Measured figures by name: seconds, tokens a second or bytes; one a round."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of the table: ``median(above) / median(below)`` against a limit.

    Attributes:
        name: what it says, in words.
        above: name of the samples in the numerator.
        below: name of those in the denominator.
        limit: what the ratio is held to.
        sense: ``at least`` or ``at most``.
        group: whom it compares with; ``self`` counts only where every ``llama`` bar is met.
        minus: subtracted from the ratio, for an overhead.
    """

    name: str
    above: str
    below: str
    limit: float
    sense: Literal["at least", "at most"]
    group: Literal["peer", "llama", "self"]
    minus: float = 0.0


BARS: Final = (
    Bar("5 adapters on 2,048 tokens against PEFT's plain LoRA", "peft_5", "ours_5", 15, "at least", "peer"),
    Bar("5 adapters on 2,048 tokens against our plain LoRA twins", "twins_5", "ours_5", 9, "at least", "peer"),
    Bar("5 adapters on 2,048 tokens against llama-server's best case", "llama_5", "ours_5", 2.5, "at least", "llama"),
    Bar("5 adapters against llama-server with five clients", "llama_clients_5", "ours_5", 15, "at least", "llama"),
    Bar("16 adapters on 2,048 tokens against llama-server's best case", "llama_16", "ours_16", 5, "at least", "llama"),
    Bar("decode step of 16 sequences against 1", "step_16", "step_1", 2.0, "at most", "self"),
    Bar("decode step of 1 base sequence against llama-server", "step_base", "llama_step", 2.5, "at most", "llama"),
    Bar(
        "TTFT at 2,048 tokens, prefix in LMDB against in the worker", "ttft_stored", "ttft_2048", 1.5, "at most", "self"
    ),
    Bar("TTFT at 6,144 tokens against 512, prefix in the worker", "ttft_6144", "ttft_512", 1.6, "at most", "self"),
    Bar("prefill tokens/s against llama.cpp", "prefill", "llama_prefill", 1.5, "at least", "llama"),
    Bar("overhead of router, gRPC and store on 5 adapters", "ours_5", "engine_5", 0.15, "at most", "self", minus=1.0),
    Bar("KV bytes of 16 adapters against 1 on 6,144 tokens", "bytes_16", "bytes_1", 1.25, "at most", "self"),
)
"""In the order in which they were set."""

BESIDE: Final = (
    ("5 adapters against llama-server with five clients, its best-found setting", "llama_clients_best_5", "ours_5"),
    ("5 adapters against llama-server's best case, its KV in half precision", "llama_half_5", "ours_5"),
    ("16 adapters against llama-server's best case, its KV in half precision", "llama_half_16", "ours_16"),
    ("decode step of 1 base sequence against llama-server, its KV in half precision", "step_base", "llama_half_step"),
    ("prefill tokens/s against llama.cpp, its KV in half precision", "prefill", "llama_half_prefill"),
)
"""Ratios that are told beside the bars and held to nothing: what they say, numerator, denominator."""


@dataclass(frozen=True, slots=True)
class Result:
    """A bar as measured.

    Attributes:
        lowest: the smallest numerator over the largest denominator; ``highest`` the other way.
        holds: the limit is met, and that counts.
        met: the ratio is what the limit wants, whatever else the run showed.
        counts: answers were right and, for a ratio of our own figures, every limit against llama-server is met.
    """

    bar: str
    value: float
    lowest: float
    highest: float
    limit: float
    sense: str
    holds: bool
    met: bool
    counts: bool
    samples: Mapping[str, Sequence[float]]


def ratio(name: str, above: str, below: str, samples: Samples) -> float:
    """The ratio of medians.

    Raises:
        ValueError: a figure was not measured, or is not positive.
    """
    for figure in (above, below):
        if not _is_known(figure, samples):
            raise ValueError(f"{name}: {figure} was not measured")
    return median(samples[above]) / median(samples[below])


def spread(above: str, below: str, samples: Samples) -> tuple[float, float]:
    """The least and the most that a round of the one is against a round of the other."""
    return min(samples[above]) / max(samples[below]), max(samples[above]) / min(samples[below])


def value_of(bar: Bar, samples: Samples) -> float:
    """What is held to the limit; raises as :func:`ratio`."""
    return ratio(bar.name, bar.above, bar.below, samples) - bar.minus


def _is_known(figure: str, samples: Samples) -> bool:
    return bool(samples.get(figure)) and median(samples[figure]) > 0


def measured(samples: Samples) -> list[Bar]:
    """The bars that there are figures for already."""
    return [bar for bar in BARS if _is_known(bar.above, samples) and _is_known(bar.below, samples)]


@dataclass(frozen=True, slots=True)
class Beside:
    """A ratio without a limit."""

    what: str
    value: float
    lowest: float
    highest: float
    samples: Mapping[str, Sequence[float]]


def beside(samples: Samples, *, bars_too: bool = False) -> list[Beside]:
    """What is told beside the bars; ``bars_too`` for adapters that the limits are not meant for."""
    bars = [(bar.name, bar.above, bar.below, bar.minus) for bar in BARS] * bars_too
    return [
        Beside(
            what,
            ratio(what, above, below, samples) - minus,
            *(end - minus for end in spread(above, below, samples)),
            _taken(above, below, samples),
        )
        for what, above, below, minus in [*bars, *((*told, 0.0) for told in BESIDE)]
    ]


def _taken(above: str, below: str, samples: Samples) -> dict[str, list[float]]:
    return {name: list(samples[name]) for name in (above, below)}


def evaluate(samples: Samples, bars: Sequence[Bar] = BARS, *, answers_right: bool) -> list[Result]:
    """Every bar, in order.

    Args:
        answers_right: every answer of ours that was compared was stock PEFT's; False as well before that is known.
    """
    values = {bar.name: value_of(bar, samples) for bar in bars}
    met = {bar.name: _is_met(bar, values[bar.name]) for bar in bars}
    llama_met = all(met[bar.name] for bar in bars if bar.group == "llama")
    counts = {bar.name: answers_right and (llama_met or bar.group != "self") for bar in bars}
    return [
        Result(
            bar=bar.name,
            value=values[bar.name],
            lowest=spread(bar.above, bar.below, samples)[0] - bar.minus,
            highest=spread(bar.above, bar.below, samples)[1] - bar.minus,
            limit=bar.limit,
            sense=bar.sense,
            holds=met[bar.name] and counts[bar.name],
            met=met[bar.name],
            counts=counts[bar.name],
            samples=_taken(bar.above, bar.below, samples),
        )
        for bar in bars
    ]


def _is_met(bar: Bar, value: float) -> bool:
    return value >= bar.limit if bar.sense == "at least" else value <= bar.limit


def as_json(results: Sequence[Result], measured_on: str) -> list[dict[str, Any]]:
    """The list that ``build/bench/bars.json`` is, every row with the machine and versions it was measured on."""
    return [{**asdict(result), "measured_on": measured_on} for result in results]
