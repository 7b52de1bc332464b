"""Scenario c: eight clients on eight conversations, questions that arrive whether or not the last was answered.

Arrivals are Poisson at a rate that doubles until the system is saturated at two rates: until it finishes less than nine
tenths of what arrives, or the median first token takes over ten seconds. The conversations are warmed before. At each
rate the systems take turns, round after round, each round with arrivals of its own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from time import perf_counter
from typing import Final

from correctness import key_of
from harness import Row, Sample, rounds_after
from lineup import Bench
from systems.base import Answer, System

from alora_serve.types import TokenIds

TITLE = "Open-loop arrivals, eight conversations, adapters drawn by Zipf's law"
BASELINE = ""
SYSTEMS = ("ours", "ours-twins", "peft-lora", "peft-alora", "llama-8", "llama-8-best")
DETAILS: Final[Mapping[str, tuple[str, int]]] = {
    "finished a second": ("completed_per_second", 2),
    "in flight": ("mean_in_flight", 1),
}
"""Further columns of the table: a figure a round."""
SATURATED_SHARE = 0.9
SATURATED_FIRST_TOKEN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What arrives.

    Attributes:
        rates: questions a second, rising.
        seconds: how long questions arrive at each rate.
        rounds: at each rate; fewer for a system that takes much longer to answer them (see ``rounds_after``).
        zipf: exponent; adapter k is drawn with weight 1 / k ** zipf.
    """

    tokens: int = 2048
    conversations: int = 8
    adapters: int = 5
    zipf: float = 1.0
    answer_tokens: int = 16
    rates: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 8, 16)
    seconds: float = 30.0
    rounds: int = 3


QUICK = Plan(tokens=512, conversations=3, rates=(0.5, 2), seconds=6.0, rounds=1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One question: when, about which conversation, to which adapter."""

    at_seconds: float
    conversation: int
    adapter: int


def arrivals(rate: float, plan: Plan, seed: int) -> list[Arrival]:
    """A Poisson process of ``rate`` a second over ``plan.seconds``; at least two arrivals."""
    drawn = random.Random(seed)
    weights = [1 / (rank**plan.zipf) for rank in range(1, plan.adapters + 1)]
    found: list[Arrival] = []
    at = drawn.expovariate(rate)
    while at < plan.seconds or len(found) < 2:
        [adapter] = drawn.choices(range(plan.adapters), weights)
        found.append(Arrival(at, drawn.randrange(plan.conversations), adapter))
        at += drawn.expovariate(rate)
    return found


def per_second(times: Sequence[float]) -> float:
    """How often something happened that happened at these times, two or more, in any order."""
    return (len(times) - 1) / (max(times) - min(times))


def saturated(offered: float, completed: float, first_token_seconds: float) -> bool:
    """Whether a rate, in questions a second, is more than the system can take."""
    return completed < SATURATED_SHARE * offered or first_token_seconds > SATURATED_FIRST_TOKEN_SECONDS


def is_over(found: Sequence[bool]) -> bool:
    """Whether rising rates end here: saturated twice in a row, as few arrivals may seem so once by chance."""
    return list(found[-2:]) == [True, True]


@dataclass(frozen=True, slots=True)
class Round:
    """What a round at one rate came to.

    Attributes:
        offered: questions a second, from the first to the last that came.
        completed: answers a second, from the first to the last: the time that the last ones take is no lack of
            throughput.
        seconds: until the last answer was there.
    """

    samples: tuple[Sample, ...]
    offered: float
    completed: float
    seconds: float

    @property
    def in_flight(self) -> float:
        """Mean number of questions in the system, by Little's law: so many a second times the seconds of each."""
        return self.completed * mean(sample.total_seconds for sample in self.samples)


def row_of(system: str, tokens: int, rate: float, rounds: Sequence[Round], answer_tokens: int) -> Row:
    """All rounds of a system at one rate: every answer's times, and what is a figure of a round in ``details``."""
    samples = tuple(sample for one in rounds for sample in one.samples)
    row = Row(system, tokens, samples, what=what_of(rate))
    offered, completed = median(one.offered for one in rounds), median(one.completed for one in rounds)
    details = {
        "rate": rate,
        "offered_per_second": [one.offered for one in rounds],
        "completed_per_second": [one.completed for one in rounds],
        "tokens_per_second": [one.completed * answer_tokens for one in rounds],
        "mean_in_flight": [one.in_flight for one in rounds],
        "saturated": saturated(offered, completed, row.median("first_token_seconds")),
    }
    return replace(row, details=details)


def what_of(rate: float) -> str:
    """What a row was asked, in words."""
    return f"{rate:g}/s"


async def run(bench: Bench, systems: dict[str, System], plan: Plan) -> list[Row]:
    """A row for each system and rate; each round of a system begins with an empty queue."""
    prefixes = [bench.renderer.of_length(plan.tokens, seed=7_000 + number) for number in range(plan.conversations)]
    for system in systems.values():
        for prefix in prefixes:
            await system.warm(prefix)
            await system.ask(prefix, bench.adapters[0], 1)
    rows: list[Row] = []
    found: dict[str, list[bool]] = {name: [] for name in systems}
    task = bench.progress.add_task("arrivals", total=len(systems) * len(plan.rates) * plan.rounds)
    for rate in plan.rates:
        going = {name: system for name, system in systems.items() if not is_over(found[name])}
        rounds: dict[str, list[Round]] = {name: [] for name in going}
        left = dict.fromkeys(going, plan.rounds)
        for number in range(plan.rounds):
            schedule = arrivals(rate, plan, seed=int(1000 * rate) + 100_000 * number)
            for name, system in going.items():
                bench.progress.advance(task)
                if not left[name]:
                    continue
                one = await _round(bench, system, prefixes, schedule, plan, what=what_of(rate), keeps=not number)
                rounds[name].append(one)
                # What takes so much longer than questions arrive is asked no more often than a slow fan-out.
                left[name] = left[name] - 1 if number else rounds_after(one.seconds - plan.seconds, plan.rounds - 1)
        for name, system in going.items():
            rows.append(row_of(system.name, plan.tokens, rate, rounds[name], plan.answer_tokens))
            found[name].append(bool(rows[-1].details["saturated"]))
        bench.keep(rows)
    bench.progress.remove_task(task)
    return sorted(rows, key=lambda row: [system.name for system in systems.values()].index(row.system))


async def _round(
    bench: Bench,
    system: System,
    prefixes: Sequence[TokenIds],
    schedule: Sequence[Arrival],
    plan: Plan,
    *,
    what: str,
    keeps: bool,
) -> Round:
    """One schedule; ``keeps`` the first answers for the comparison with PEFT."""
    began = perf_counter()

    async def client(arrival: Arrival) -> tuple[Answer, float]:
        await asyncio.sleep(max(0.0, began + arrival.at_seconds - perf_counter()))
        adapter = bench.adapters[arrival.adapter]
        answer = await system.ask(prefixes[arrival.conversation], adapter, plan.answer_tokens)
        return answer, perf_counter() - began

    answered = await asyncio.gather(*(client(arrival) for arrival in schedule))
    if keeps:
        key = key_of(Row(system.name, plan.tokens, (), what=what))
        for arrival, (answer, _) in list(zip(schedule, answered, strict=True))[:8]:
            adapter = bench.adapters[arrival.adapter]
            bench.answers.keep(key, system, prefixes[arrival.conversation], adapter, answer)
    return Round(
        samples=tuple(Sample(answer.first_token_seconds, answer.total_seconds) for answer, _ in answered),
        offered=per_second([arrival.at_seconds for arrival in schedule]),
        completed=per_second([finished for _, finished in answered]),
        seconds=max(finished for _, finished in answered),
    )
