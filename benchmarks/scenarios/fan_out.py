"""Scenario a: one conversation, many adapters. Lengths times numbers of adapters, every system in every round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from correctness import key_of
from harness import Row, Sample, rounds_after
from lineup import Bench
from systems.base import FanOutAnswers, System, Warmed

TITLE = "Fan-out on one conversation, end to end"
BASELINE = "PEFT, plain LoRA, recomputed"
SYSTEMS = (
    *("ours", "ours-resident", "ours-twins", "peft-lora", "peft-alora"),
    *("llama", "llama-5", "llama-5-best"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask.

    Attributes:
        tokens: lengths of the conversations.
        adapters: how many are asked at once.
        rounds: counted, after one warm-up; fewer for the very slow (see ``rounds_after``).
        skip: system and number of adapters that are left out, where a bar asks about others alone.
    """

    tokens: tuple[int, ...] = (512, 2048, 6144)
    adapters: tuple[int, ...] = (1, 5, 16)
    answer_tokens: int = 16
    rounds: int = 5
    skip: frozenset[tuple[str, int]] = frozenset()


QUICK = Plan(tokens=(512,), adapters=(1, 5), rounds=1)


async def run(bench: Bench, systems: dict[str, System], plan: Plan) -> list[Row]:
    """Every row; prefills come along in ``details`` as ``prefill_tokens_per_second``."""
    rows: list[Row] = []
    for tokens in plan.tokens:
        for count in plan.adapters:
            chosen = {name: system for name, system in systems.items() if (name, count) not in plan.skip}
            rows += await _measure(bench, chosen, tokens, count, plan)
            bench.keep(rows)
    return rows


async def _measure(bench: Bench, systems: dict[str, System], tokens: int, count: int, plan: Plan) -> list[Row]:
    """One length and number of adapters: rounds in which every system is asked about the same new conversation."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    prefills: dict[str, list[float]] = defaultdict(list)
    left: dict[str, int] = {}
    rows: dict[str, Row] = {}
    task = bench.progress.add_task(f"{tokens:,} tokens, {count} adapters", total=(1 + plan.rounds) * len(systems))
    for number in range(1 + plan.rounds):
        # A conversation of its own for each round and number of adapters: no worker has seen it.
        prefix = bench.renderer.of_length(tokens, seed=100_000 * tokens + 100 * count + number)
        for name, system in systems.items():
            bench.progress.advance(task)
            if number and not left[name]:
                continue
            warmed, answers = await _round(bench, system, prefix, count, plan)
            sample = Sample(mean(a.first_token_seconds for a in answers.answers), answers.total_seconds)
            if not number:
                left[name] = rounds_after(sample.total_seconds, plan.rounds)
                row = Row(system.name, len(prefix), (), what=_asked(count), adapters=count)
                rows[name] = replace(row, fetched_bytes=_fetched(answers))
            if number or not left[name]:
                samples[name].append(sample)
                prefills[name].append(warmed.computed_tokens / warmed.seconds if warmed.seconds else 0.0)
            if number == (1 if left[name] else 0):
                for adapter, answer in zip(bench.adapters, answers.answers, strict=False):
                    bench.answers.keep(key_of(rows[name]), system, prefix, adapter, answer)
            left[name] -= bool(number)
    bench.progress.remove_task(task)
    return [
        replace(
            row,
            samples=tuple(samples[name]),
            details={"prefill_tokens_per_second": prefills[name]} if any(prefills[name]) else {},
        )
        for name, row in rows.items()
    ]


async def _round(
    bench: Bench, system: System, prefix: tuple[int, ...], count: int, plan: Plan
) -> tuple[Warmed, FanOutAnswers]:
    warmed = await system.warm(prefix)
    return warmed, await system.fan_out(prefix, bench.adapters[:count], plan.answer_tokens)


def _asked(count: int) -> str:
    return "1 adapter" if count == 1 else f"{count} adapters"


def _fetched(answers: FanOutAnswers) -> int:
    return int(max(answer.notes.get("fetched_bytes", 0) for answer in answers.answers))


def find(rows: Sequence[Row], system: str, adapters: int) -> Row | None:
    """The row of a system and number of adapters, if it was measured."""
    return next((row for row in rows if (row.system, row.adapters) == (system, adapters)), None)
