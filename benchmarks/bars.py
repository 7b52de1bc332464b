"""The bars: which ratio of which figures, and what it must be. Pure; ``measure_bars.py`` measures.

A ratio of our own figures proves nothing if its denominator is slow, so such a bar *counts* only in a run in which
every bar against llama-server holds.
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
        group: whom it compares with; ``self`` counts only where every ``llama`` bar holds.
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
"""In the issue's order."""


@dataclass(frozen=True, slots=True)
class Result:
    """A bar as measured. ``counts`` is False for a ratio of our own figures in a run where a llama bar fails."""

    bar: str
    value: float
    limit: float
    sense: str
    holds: bool
    counts: bool
    samples: Mapping[str, Sequence[float]]


def value_of(bar: Bar, samples: Samples) -> float:
    """The ratio of medians.

    Raises:
        ValueError: a figure was not measured, or is not positive.
    """
    for name in (bar.above, bar.below):
        if not samples.get(name) or median(samples[name]) <= 0:
            raise ValueError(f"{bar.name}: {name} was not measured")
    above, below = median(samples[bar.above]), median(samples[bar.below])
    return above / below - bar.minus


def evaluate(samples: Samples, bars: Sequence[Bar] = BARS) -> list[Result]:
    """Every bar, in order."""
    values = {bar.name: value_of(bar, samples) for bar in bars}
    holds = {bar.name: _holds(bar, values[bar.name]) for bar in bars}
    llama_holds = all(holds[bar.name] for bar in bars if bar.group == "llama")
    return [
        Result(
            bar=bar.name,
            value=values[bar.name],
            limit=bar.limit,
            sense=bar.sense,
            holds=holds[bar.name],
            counts=llama_holds or bar.group != "self",
            samples={name: list(samples[name]) for name in (bar.above, bar.below)},
        )
        for bar in bars
    ]


def _holds(bar: Bar, value: float) -> bool:
    return value >= bar.limit if bar.sense == "at least" else value <= bar.limit


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The list that ``build/bench/bars.json`` is."""
    return [asdict(result) for result in results]
