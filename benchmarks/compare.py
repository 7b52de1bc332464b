"""``make bench-peers``: this project and its peers, asked the same in the same run.

Scenarios:
  a  fan-out of 1, 5 and 16 adapters on 512, 2,048 and 6,144 tokens
  b  base turn, adapter, base turn, adapter: six turns of one conversation
  c  eight clients on eight conversations, open-loop arrivals at rising rates
  d  a cold worker on a warm store, LMDB and Valkey
  e  replay: conversations that share a system prompt and grow

The first run builds llama-server (minutes) and makes the adapters. Every table has a column that says how many answers
are those of stock PEFT run cold. Figures go to build/bench/SCENARIO.json; ``make bench-pictures`` draws them.

Examples:
  make bench-peers ARGS="--scenario a --tokens 2048 --adapters 5"
  make bench-peers ARGS="--scenario b --systems ours llama"
  make bench-peers ARGS="--quick"             every scenario in miniature, to see that all of it works
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from correctness import with_verdicts
from harness import OUTPUT, Row, describe_machine, file_suffix, write
from lineup import SYSTEMS, Bench, add_machine_flags, open_bench
from peers.build_llama import BuildError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scenarios import arrivals, cold_worker, fan_out, turns
from tables import PREFILLS, rows_table

from alora_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Scenario:
    """One letter of the list above: what is asked, of whom, and against whom the table's last column compares.

    ``details`` are further columns of the table.
    """

    title: str
    plan: Any
    quick: Any
    systems: tuple[str, ...]
    baseline: str
    by: str = "first_token_seconds"
    details: Mapping[str, tuple[str, int]] = field(default_factory=dict)


SCENARIOS = {
    "a": Scenario(
        fan_out.TITLE, fan_out.Plan(), fan_out.QUICK, fan_out.SYSTEMS, fan_out.BASELINE, "total_seconds", PREFILLS
    ),
    "b": Scenario(turns.TITLES["b"], turns.Plan(), turns.QUICK, turns.SYSTEMS, turns.BASELINE),
    "c": Scenario(
        arrivals.TITLE, arrivals.Plan(), arrivals.QUICK, arrivals.SYSTEMS, arrivals.BASELINE, details=arrivals.DETAILS
    ),
    "d": Scenario(cold_worker.TITLE, cold_worker.Plan(), cold_worker.QUICK, cold_worker.SYSTEMS, cold_worker.BASELINE),
    "e": Scenario(turns.TITLES["e"], turns.Plan(), turns.QUICK, turns.SYSTEMS, turns.BASELINE),
}


def progress_on(console: Console) -> Progress:
    """Bars with counts and time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


async def play(bench: Bench, letter: str, plan: Any, systems: Sequence[str]) -> list[Row]:
    """All rows of one scenario, compared with PEFT."""
    if letter == "d":
        rows = await cold_worker.run(bench, plan, systems)
    else:
        async with bench.systems(systems) as running:
            match letter:
                case "a":
                    rows = await fan_out.run(bench, running, plan)
                case "c":
                    rows = await arrivals.run(bench, running, plan)
                case _:
                    rows = await turns.run(bench, running, letter, plan)
    bench.keep(rows)  # comparing may take longer than measuring did
    return with_verdicts(rows, await bench.answers.judge(bench.model, bench.dtype, bench.progress))


def planned(scenario: Scenario, arguments: argparse.Namespace) -> Any:
    """The scenario's plan with what the command line changes."""
    plan = scenario.quick if arguments.quick else scenario.plan
    fields = type(plan).__dataclass_fields__
    if arguments.tokens and "tokens" in fields:
        several = isinstance(plan.tokens, tuple)
        plan = replace(plan, tokens=tuple(arguments.tokens) if several else arguments.tokens[0])
    if arguments.adapters and isinstance(getattr(plan, "adapters", None), tuple):
        plan = replace(plan, adapters=tuple(arguments.adapters))
    if arguments.rounds is not None and "rounds" in fields:
        plan = replace(plan, rounds=arguments.rounds)
    return plan


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the conversation (a); the length (b, c, d)")
    parser.add_argument("--adapters", type=int, nargs="+", help="numbers of adapters asked at once (a)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: those the scenario names")
    parser.add_argument("--rounds", type=int, help="counted rounds (default: 5, in c 3)")
    parser.add_argument("--quick", action="store_true", help="short conversations, one round")
    parser.add_argument("--kind", choices=["qkv", "all-linear"], default="qkv", help="what the adapters adapt")
    parser.add_argument("--json", action="store_true", help="print the files' paths alone")
    add_machine_flags(parser)
    return parser.parse_args(argv)


def report(letter: str, rows: Sequence[Row], bench: Bench, plan: Any, arguments: argparse.Namespace) -> Path:
    """Write the file and, unless asked for machines, print the table."""
    scenario = SCENARIOS[letter]
    facts = {
        "scenario": scenario.title,
        "plan": {name: str(getattr(plan, name)) for name in type(plan).__dataclass_fields__},
        "dtype": bench.dtype,
        "model": bench.model.name,
        "adapters": arguments.kind,
        **bench.facts,
    }
    path = write(f"scenario-{letter}{file_suffix(arguments)}", rows, facts)
    (OUTPUT / f"{_unfinished(letter)}.json").unlink(missing_ok=True)
    if not arguments.json:
        print(f"\n{scenario.title}, {bench.dtype}: medians (smallest-largest), seconds\n")
        print(rows_table(rows, baseline=scenario.baseline, by=scenario.by, details=scenario.details), end="\n\n")
    return path


def _unfinished(letter: str) -> str:
    return f"scenario-{letter}-unfinished"


async def run(arguments: argparse.Namespace, console: Console) -> list[Path]:
    """Every scenario asked for; the files."""
    paths = []
    for letter in arguments.scenario:
        scenario = SCENARIOS[letter]
        plan = planned(scenario, arguments)
        with progress_on(console) as progress:
            count = max(plan.adapters) if isinstance(getattr(plan, "adapters", 0), tuple) else 5
            bench = open_bench(
                console,
                progress,
                adapters=count,
                kind=arguments.kind,
                dtype=arguments.dtype,
                device=arguments.device,
            )
            bench.keep = partial(write, _unfinished(letter), facts=bench.facts)
            rows = await play(bench, letter, plan, arguments.systems or scenario.systems)
        paths.append(report(letter, rows, bench, plan, arguments))
    return paths


def main() -> None:
    """Parse flags, measure, print tables, write files."""
    arguments = parse()
    console = Console(stderr=True)
    if not arguments.json:
        console.print(f"{describe_machine()}, SmolLM2-135M-Instruct")
    try:
        for path in asyncio.run(run(arguments, console)):
            print(path)
    except (BuildError, ConfigError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
