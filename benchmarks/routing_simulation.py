"""Replays the router's policy against simulated fleets: time to first token, adapters loaded, bytes fetched.

Discrete events, no clock: a run depends on nothing but its arguments and its seed. Workers have the speeds measured for
SmolLM2-135M (see ``routing_worker.Speeds``); several router replicas each see reports up to ``--report-seconds`` old.
All policies meet the same requests at the same moments.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table
from routing_policies import LOAD_FACTOR, POLICIES, Predicted, Router
from routing_traffic import Conversation, Request, Traffic, Turn, requests, turns
from routing_worker import Speeds, Worker, model_info

from alora_serve.kv.fingerprints import STRIDE_TOKENS
from alora_serve.types import EndpointStatus, PrefixDigest

OUTPUT = Path(__file__).resolve().parents[1] / "build" / "bench" / "routing.json"
WARM_UP = 1 / 3
"""Share of a run that is not counted: memories fill."""


@dataclass(frozen=True)
class Scenario:
    """One fleet under one load.

    Attributes:
        load: requests sent, as a share of what the fleet answers at most, each on a prefix of its own, all in memory.
        routers: replicas, each with its own view.
        report_seconds: time between a worker's reports.
    """

    workers: int
    traffic: Traffic
    load: float = 0.6
    routers: int = 2
    report_seconds: float = 1.0
    seconds: float = 60.0
    speeds: Speeds = field(default_factory=Speeds)

    @property
    def name(self) -> str:
        """For people."""
        fan_outs = "" if self.traffic.fan_out else ", no fan-outs"
        return f"{self.workers} workers, {self.traffic.adapters:,} adapters, load {self.load:.0%}{fan_outs}"


@dataclass(frozen=True)
class Outcome:
    """What one policy came to. Sequences of a fan-out count one by one."""

    policy: str
    requests: int
    ttft_p50_seconds: float
    ttft_p99_seconds: float
    adapter_loads_per_1000: float
    fetched_bytes_per_request: float
    workers_per_fan_out: float


class Simulation:
    """One run: events in the order of time, and of their making where times are equal."""

    def __init__(self, scenario: Scenario, policy: str, seed: int) -> None:
        self._scenario, self._policy = scenario, policy
        self._workers = [Worker(scenario.speeds) for _ in range(scenario.workers)]
        rng = random.Random(f"{seed} routers")
        self._routers: list[Router] = [POLICIES[policy](self._workers, rng) for _ in range(scenario.routers)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count()
        self._ttft: list[float] = []
        self._spread: dict[int, set[int]] = {}
        self._sent: dict[Request, tuple[Router, int]] = {}
        self._counted_from = scenario.seconds * WARM_UP
        self._before = (0, 0)
        phase = random.Random(f"{seed} reports")
        for worker in range(scenario.workers):
            self._at(-phase.random() * scenario.report_seconds, self._report, worker)
        traffic = random.Random(f"{seed} traffic")
        shape = scenario.traffic
        capacity = scenario.workers * scenario.speeds.requests_a_second(shape.mean_prefix_tokens)
        rate = scenario.load * capacity / shape.requests_a_turn
        for turn in turns(shape, turns_a_second=rate, seconds=scenario.seconds, rng=traffic):
            self._at(turn.seconds, self._arrive, turn)
        self._at(self._counted_from, self._begin_counting)

    def run(self) -> Outcome:
        """To the last answer of the last turn."""
        while self._events:
            now, _, event, arguments = heapq.heappop(self._events)
            event(now, *arguments)
        cuts = statistics.quantiles(self._ttft, n=100, method="inclusive")
        loads, fetched = self._totals()
        spread = [len(workers) for workers in self._spread.values()]
        return Outcome(
            self._policy,
            len(self._ttft),
            cuts[49],
            cuts[98],
            1000 * (loads - self._before[0]) / len(self._ttft),
            (fetched - self._before[1]) / len(self._ttft),
            statistics.fmean(spread) if spread else 0.0,
        )

    def _at(self, seconds: float, event: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), event, arguments))

    def _arrive(self, now: float, turn: Turn) -> None:
        number = next(self._numbers)
        router = self._routers[number % len(self._routers)]
        for request in requests(turn, number, answer_tokens=self._scenario.speeds.answer_tokens):
            chosen = router.choose(request, now)
            request.sent = now
            self._sent[request] = router, chosen
            if len(turn.adapters) > 1 and now >= self._counted_from:
                self._spread.setdefault(number, set()).add(chosen)
            self._at(self._workers[chosen].accept(request, now), self._ready, chosen, request)

    def _ready(self, now: float, worker: int, request: Request) -> None:
        self._workers[worker].ready(request)
        if self._workers[worker].step_ends is None:
            self._begin_step(now, worker)

    def _begin_step(self, now: float, worker: int) -> None:
        self._workers[worker].begin_step(now)
        ends = self._workers[worker].step_ends
        if ends is not None:
            self._at(ends, self._end_step, worker)

    def _end_step(self, now: float, worker: int) -> None:
        first, done = self._workers[worker].end_step(now)
        self._ttft += [now - request.sent for request in first if request.sent >= self._counted_from]
        for request in done:
            router, _ = self._sent.pop(request)
            router.ended(request, worker)
        self._begin_step(now, worker)

    def _report(self, now: float, worker: int) -> None:
        status, resident = self._workers[worker].status(), frozenset(self._workers[worker].adapters)
        for router in self._routers:
            router.report(worker, status, resident)
        if now < self._scenario.seconds:
            self._at(now + self._scenario.report_seconds, self._report, worker)

    def _begin_counting(self, now: float) -> None:
        self._before = self._totals()

    def _totals(self) -> tuple[int, int]:
        return sum(w.loads for w in self._workers), sum(w.fetched_bytes for w in self._workers)


def compare(scenario: Scenario, policies: Sequence[str], seed: int) -> list[Outcome]:
    """Each policy on the same requests."""
    return [Simulation(scenario, policy, seed).run() for policy in policies]


def pick_seconds(endpoints: int = 300, repeats: int = 300, prefix_tokens: int = 6144) -> float:
    """What one pick of the router takes: a busy fleet, every digest full, a long conversation. The median of many."""
    rng = random.Random(0)
    conversation = Conversation(1, 0, 512, prefix_tokens)
    prefix = conversation.fingerprints
    view = Predicted([Worker(Speeds()) for _ in range(endpoints)], rng)
    for number in range(endpoints):
        held = {*prefix[: rng.choice((0, 2, 2, 2, 12))], *(rng.getrandbits(59) for _ in range(1000))}
        status = EndpointStatus(
            model_info(Speeds()),
            running=rng.randrange(12),
            max_running=16,
            step_seconds=rng.uniform(0.04, 0.06),
            fetch_bytes_per_second=2e9,
            prefill_tokens_per_second=900,
            adapter_load_seconds=0.05,
            sequence_seconds=1.0,
            resident_prefixes=PrefixDigest(STRIDE_TOKENS, frozenset(held)),
        )
        view.report(number, status, frozenset({"a1"} if number % 3 == 0 else ()))
    request = requests(Turn(0.0, conversation, ("a1",)), 0, answer_tokens=16)[0]
    seconds = []
    for _ in range(repeats):
        began = perf_counter()
        chosen = view.choose(request, 0.0)
        view.ended(request, chosen)
        seconds.append(perf_counter() - began)
    return statistics.median(seconds)


def scenarios(*, quick: bool) -> list[Scenario]:
    """What is run: small, middle and large fleets; adapters that fit every worker's memory, some, or hardly any."""
    if quick:
        return [Scenario(4, Traffic(adapters=200), seconds=20.0)]
    return [
        Scenario(3, Traffic(adapters=10), seconds=300.0),
        Scenario(3, Traffic(adapters=1000), seconds=300.0),
        Scenario(30, Traffic(adapters=100), seconds=60.0),
        Scenario(30, Traffic(adapters=1000), seconds=60.0),
        Scenario(30, Traffic(adapters=1000), seconds=60.0, load=0.85),
        Scenario(30, Traffic(adapters=1000, fan_out=0.0), seconds=60.0),
        Scenario(300, Traffic(adapters=10), seconds=10.0),
        Scenario(300, Traffic(adapters=10_000), seconds=10.0),
    ]


def show(console: Console, scenario: Scenario, outcomes: Sequence[Outcome]) -> None:
    """A table of one scenario."""
    table = Table(title=scenario.name, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for heading in ("TTFT p50 ms", "TTFT p99 ms", "loads / 1,000", "MB fetched / request", "workers / fan-out"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.policy,
            f"{outcome.ttft_p50_seconds * 1e3:.0f}",
            f"{outcome.ttft_p99_seconds * 1e3:.0f}",
            f"{outcome.adapter_loads_per_1000:.0f}",
            f"{outcome.fetched_bytes_per_request / 1e6:.1f}",
            f"{outcome.workers_per_fan_out:.2f}",
        )
    console.print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same numbers [1]")
    parser.add_argument("--quick", action="store_true", help="one small fleet, in seconds")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes [build/bench/routing.json]")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="only this one; may be repeated")
    parser.add_argument("--workers", type=int, help="one fleet of this size instead of the list")
    parser.add_argument("--adapters", type=int, default=100, help="with --workers: how many adapters [100]")
    parser.add_argument("--load", type=float, default=0.6, help="with --workers: share of the fleet's capacity [0.6]")
    parser.add_argument("--seconds", type=float, default=60.0, help="with --workers: simulated time [60]")
    parser.add_argument("--routers", type=int, default=2, help="router replicas [2]")
    parser.add_argument("--report-seconds", type=float, default=1.0, help="time between a worker's reports [1]")
    parser.add_argument("--step-seconds", type=float, default=0.033, help="a step, before anything runs in it [0.033]")
    parser.add_argument("--fetch-bytes-per-second", type=float, default=2e9, help="from the store [2e9]")
    parser.add_argument("--adapter-load-seconds", type=float, default=0.050, help="reading an adapter [0.050]")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, show, write."""
    given = parse(arguments)
    speeds = Speeds(
        step_seconds=given.step_seconds,
        fetch_bytes_per_second=given.fetch_bytes_per_second,
        adapter_load_seconds=given.adapter_load_seconds,
    )
    chosen = scenarios(quick=given.quick)
    if given.workers:
        chosen = [Scenario(given.workers, Traffic(adapters=given.adapters), given.load, seconds=given.seconds)]
    console = Console(quiet=given.json)
    results = []
    for listed in chosen:
        scenario = replace(listed, routers=given.routers, report_seconds=given.report_seconds, speeds=speeds)
        outcomes = compare(scenario, given.policy or list(POLICIES), given.seed)
        show(console, scenario, outcomes)
        results.append({"scenario": asdict(scenario), "outcomes": [asdict(outcome) for outcome in outcomes]})
    microseconds = pick_seconds() * 1e6
    console.print(f"one pick among 300 endpoints: {microseconds:.0f} µs")
    document = {"seed": given.seed, "load_factor": LOAD_FACTOR, "pick_microseconds": microseconds, "runs": results}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(document, indent=2) + "\n")
    if given.json:
        print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
