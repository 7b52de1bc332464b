"""``make bench-bars``: measures what the bars of benchmarks/bars.py compare, all in one run, and says which hold.

Writes build/bench/bars.json, a list of {"bar", "value", "limit", "sense", "holds", "counts", "samples"}, one a row, and
build/bench/bars-rows.json with every fan-out row, its samples and how many answers were those of stock PEFT. Takes
about 20 minutes on two cores, and wants the machine for itself. The first run builds llama-server (minutes).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bars import Result, as_json, evaluate
from compare import progress_on
from correctness import with_verdicts
from harness import Row, machine, show, write, write_json
from lineup import LLAMA, Bench, open_bench
from peers.build_llama import BuildError
from rich.console import Console
from rich.table import Table
from scenarios import fan_out

SYSTEMS = ("ours", "ours-twins", "engine", "peft-lora", "llama", "llama-5", "llama-5-best")
_AT_SIXTEEN = {"ours", "llama"}
STEP_TOKENS = 32
"""Generated while steps are timed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Lengths and rounds: of the fan-outs, and the short and the long conversation of the other bars."""

    tokens: int = 2048
    short: int = 512
    long: int = 6144
    rounds: int = 5
    memory_rounds: int = 2


QUICK = Plan(tokens=512, short=256, long=1024, rounds=1, memory_rounds=1)

Samples = dict[str, list[float]]


async def measure(bench: Bench, plan: Plan) -> tuple[Samples, list[Row]]:
    """All figures, and the fan-outs' rows."""
    samples: Samples = defaultdict(list)
    async with bench.systems(SYSTEMS) as systems:
        rows = await fan_out.run(bench, systems, _fan_outs(plan))
        _take_rows(rows, {name: system.name for name, system in systems.items()}, samples)
        await _first_tokens(bench, systems["ours"], plan, samples)
        await _steps(bench, systems["engine"], systems["llama"], plan, samples)
    # A fresh process, whose budget these conversations fit: none is let go of while the next is counted.
    async with bench.systems(["engine"]) as systems:
        await _memory(bench, systems["engine"], plan, samples)
    return samples, rows


def _fan_outs(plan: Plan) -> fan_out.Plan:
    skip = frozenset((name, 16) for name in SYSTEMS if name not in _AT_SIXTEEN)
    return fan_out.Plan(tokens=(plan.tokens,), adapters=(5, 16), rounds=plan.rounds, skip=skip)


def _take_rows(rows: Sequence[Row], names: dict[str, str], samples: Samples) -> None:
    """Figures by the names that bars know."""
    known = {
        "peft_5": ("peft-lora", 5),
        "twins_5": ("ours-twins", 5),
        "ours_5": ("ours", 5),
        "ours_16": ("ours", 16),
        "engine_5": ("engine", 5),
        "llama_5": ("llama", 5),
        "llama_16": ("llama", 16),
        "llama_clients_5": ("llama-5", 5),
    }
    for name, (system, adapters) in known.items():
        row = fan_out.find(rows, names[system], adapters)
        samples[name] = [sample.total_seconds for sample in row.samples]
    for name, system in (("prefill", "ours"), ("llama_prefill", "llama")):
        samples[name] = list(fan_out.find(rows, names[system], 5).details["prefill_tokens_per_second"])


async def _first_tokens(bench: Bench, ours: Any, plan: Plan, samples: Samples) -> None:
    """One adapter: the prefix in the store but not in the worker, and in the worker at three lengths."""
    resident = {"ttft_512": plan.short, "ttft_6144": plan.long}
    prefixes = {name: bench.renderer.of_length(tokens, seed=31 + tokens) for name, tokens in resident.items()}
    task = bench.progress.add_task("first tokens", total=1 + plan.rounds)
    for prefix in prefixes.values():
        await ours.warm(prefix)
    for number in range(1 + plan.rounds):
        new = bench.renderer.of_length(plan.tokens, seed=3_000 + number)
        await ours.warm(new)
        asked = {"ttft_stored": new, "ttft_2048": new, **prefixes}
        for name, prefix in asked.items():
            answer = await ours.ask(prefix, bench.adapters[0], 4)
            if number:
                samples[name].append(answer.first_token_seconds)
        bench.progress.advance(task)
    bench.progress.remove_task(task)


async def _steps(bench: Bench, engine: Any, llama: Any, plan: Plan, samples: Samples) -> None:
    """Decode steps on one conversation: of the engine with 16 adapters, with 1, with none; and llama-server's."""
    prefix = bench.renderer.of_length(plan.tokens, seed=41)
    task = bench.progress.add_task("decode steps", total=1 + plan.rounds)
    for system in (engine, llama):
        await system.warm(prefix)
    for number in range(1 + plan.rounds):
        taken = {
            "step_16": await engine.step_seconds(prefix, bench.adapters, STEP_TOKENS),
            "step_1": await engine.step_seconds(prefix, bench.adapters[:1], STEP_TOKENS),
            "step_base": await engine.step_seconds(prefix, [None], STEP_TOKENS),
            "llama_step": (await llama.ask(prefix, None, STEP_TOKENS)).token_seconds,
        }
        if number:
            for name, seconds in taken.items():
                samples[name].append(seconds)
        bench.progress.advance(task)
    bench.progress.remove_task(task)


async def _memory(bench: Bench, engine: Any, plan: Plan, samples: Samples) -> None:
    task = bench.progress.add_task("memory", total=plan.memory_rounds)
    for number in range(plan.memory_rounds):
        for name, count in (("bytes_1", 1), ("bytes_16", 16)):
            prefix = bench.renderer.of_length(plan.long, seed=5_000 + 16 * number + count)
            found = await engine.memory(prefix, bench.adapters[:count], STEP_TOKENS)
            samples[name].append(found.size_bytes)
        bench.progress.advance(task)
    bench.progress.remove_task(task)


def show_results(results: Sequence[Result], console: Console) -> None:
    """The bars as a table."""
    table = Table(title="Bars")
    for column in ("bar", "measured", "limit", "holds"):
        table.add_column(column, justify="left" if column == "bar" else "right")
    for result in results:
        holds = ("yes" if result.holds else "NO") + ("" if result.counts else ", does not count")
        table.add_row(result.bar, f"{result.value:.2f}", f"{result.sense} {result.limit:g}", holds)
    console.print(table)


async def run(arguments: argparse.Namespace, console: Console) -> list[Result]:
    """Measure, compare answers with PEFT, write both files."""
    plan = QUICK if arguments.quick else Plan(rounds=arguments.rounds)
    suffix = "-quick" if arguments.quick else ""
    with progress_on(console) as progress:
        bench = open_bench(console, progress, adapters=16, dtype=arguments.dtype)
        samples, rows = await measure(bench, plan)
        rows = with_verdicts(rows, await bench.answers.judge(bench.model, bench.dtype, progress))
    results = evaluate(samples)
    write(f"bars-rows{suffix}", rows, {"dtype": bench.dtype, "model": bench.model.name, **bench.facts})
    path = write_json(f"bars{suffix}", as_json(results))
    if not arguments.json:
        wide = Console(width=None if sys.stdout.isatty() else 180)
        show(rows, baseline=LLAMA["llama"].name, console=wide, title="Fan-outs", by="total_seconds")
        show_results(results, wide)
    print(path)
    return results


def main() -> None:
    """Parse flags and run. The exit status is 1 if a bar does not hold and --check was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after one warm-up; fewer for the slowest")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: what the processor does natively")
    parser.add_argument("--quick", action="store_true", help="512 tokens and one round, to see that all of it works")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every bar holds and counts")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    if not arguments.json:
        facts = machine()
        console.print(f"{facts['processor']}, {facts['cores']} cores, SmolLM2-135M-Instruct")
    try:
        results = asyncio.run(run(arguments, console))
    except BuildError as error:
        sys.exit(str(error))
    if arguments.check and not all(result.holds and result.counts for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
