"""Scenario c: eight clients on eight conversations, questions that arrive whether or not the last was answered.

Arrivals are Poisson at a rate that doubles until the system is saturated at two rates: until it finishes less than nine
tenths of what arrives, or the median first token takes over ten seconds. The conversations are warmed before.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from correctness import key_of
from harness import Row, Sample
from lineup import Bench
from systems.base import Answer, System

TITLE = "Open-loop arrivals, eight conversations, adapters drawn by Zipf's law"
BASELINE = ""
SYSTEMS = ("ours", "ours-twins", "peft-alora", "llama-8", "llama-8-best")
SATURATED_SHARE = 0.9
SATURATED_FIRST_TOKEN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What arrives.

    Attributes:
        rates: questions a second, rising.
        seconds: how long questions arrive at each rate.
        zipf: exponent; adapter k is drawn with weight 1 / k ** zipf.
    """

    tokens: int = 2048
    conversations: int = 8
    adapters: int = 5
    zipf: float = 1.0
    answer_tokens: int = 16
    rates: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 8, 16)
    seconds: float = 30.0


QUICK = Plan(tokens=512, conversations=3, rates=(0.5, 2), seconds=6.0)


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


async def run(bench: Bench, systems: dict[str, System], plan: Plan) -> list[Row]:
    """A row for each system and rate; rates of one system follow each other, as each begins with an empty queue."""
    prefixes = [bench.renderer.of_length(plan.tokens, seed=7_000 + number) for number in range(plan.conversations)]
    rows: list[Row] = []
    task = bench.progress.add_task("arrivals", total=len(systems) * len(plan.rates))
    for system in systems.values():
        for prefix in prefixes:
            await system.warm(prefix)
            await system.ask(prefix, bench.adapters[0], 1)
        found: list[bool] = []
        for rate in plan.rates:
            row = await _at_rate(bench, system, prefixes, rate, plan)
            rows.append(row)
            bench.keep(rows)
            found.append(bool(row.details["saturated"]))
            bench.progress.advance(task)
            if is_over(found):
                break
    bench.progress.remove_task(task)
    return rows


async def _at_rate(bench: Bench, system: System, prefixes: Sequence[tuple[int, ...]], rate: float, plan: Plan) -> Row:
    schedule = arrivals(rate, plan, seed=int(1000 * rate))
    began = perf_counter()

    async def client(arrival: Arrival) -> tuple[Answer, float]:
        await asyncio.sleep(max(0.0, began + arrival.at_seconds - perf_counter()))
        adapter = bench.adapters[arrival.adapter]
        answer = await system.ask(prefixes[arrival.conversation], adapter, plan.answer_tokens)
        return answer, perf_counter() - began

    answered = await asyncio.gather(*(client(arrival) for arrival in schedule))
    samples = tuple(Sample(answer.first_token_seconds, answer.total_seconds) for answer, _ in answered)
    row = Row(system.name, len(prefixes[0]), samples, what=f"{rate:g}/s")
    # From first to last of each: the time that the last answers take is not a lack of throughput.
    offered = per_second([arrival.at_seconds for arrival in schedule])
    completed = per_second([finished for _, finished in answered])
    for arrival, (answer, _) in list(zip(schedule, answered, strict=True))[:8]:
        adapter = bench.adapters[arrival.adapter]
        bench.answers.keep(key_of(row), system, prefixes[arrival.conversation], adapter, answer)
    details = {
        "rate": rate,
        "offered_per_second": offered,
        "completed_per_second": completed,
        "tokens_per_second": completed * plan.answer_tokens,
        # Little's law: arrivals a second times seconds in the system.
        "mean_in_flight": completed * sum(sample.total_seconds for sample in samples) / len(samples),
        "saturated": saturated(offered, completed, row.median("first_token_seconds")),
    }
    return Row(system.name, len(prefixes[0]), samples, what=row.what, details=details)
