"""``make bench-bars``: measures what the bars of benchmarks/bars.py compare, all in one run, and says which hold.

Writes build/bench/bars.json, a list of {"bar", "value", "limit", "sense", "holds", "met", "counts", "samples",
"measured_on"}, one a row, and build/bench/bars-rows.json with every fan-out row, its samples and how many answers were
those of stock PEFT, and the ratios that are told beside the bars. ``met`` says what the ratio alone says, ``holds``
whether it also ``counts``: nothing does in a run in which an answer of ours was not PEFT's, and no ratio of our own
figures where a limit against llama-server is not met. With --kind all-linear, whose adapters the limits are not meant
for, all ratios are told beside and there is no bars.json. What a run that was cut off had measured is in
bars-rows-unfinished.json and bars-unfinished.json, where nothing holds, as no answer was compared yet.

Takes about half an hour on two cores, and wants the machine for itself. The first run builds llama-server (minutes).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bars import Beside, Result, as_json, beside, evaluate, measured
from compare import progress_on
from correctness import RowKey, key_of, with_verdicts
from harness import OUTPUT, Correct, Row, describe_machine, file_suffix, measured_on, write, write_json
from lineup import LLAMA, Bench, add_machine_flags, open_bench
from peers.build_llama import BuildError
from rich.console import Console
from scenarios import fan_out
from tables import PREFILLS, as_peft, markdown, rows_table

from alora_serve.errors import ConfigError

OURS = ("ours", "ours-twins", "engine")
"""Whose answers must be right for anything to count."""
SYSTEMS = (*OURS, "peft-lora", "llama", "llama-f16", "llama-5", "llama-5-best")
_AT_SIXTEEN = {"ours", "llama", "llama-f16"}
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


@dataclass(frozen=True, slots=True)
class Measurement:
    """All that a run found.

    Attributes:
        samples: figures by name.
        rows: the fan-outs'.
        keys: under which the answers behind a figure are kept, where they are.
        ours: what our own systems are called in rows and keys.
    """

    samples: Samples
    rows: list[Row]
    keys: dict[str, RowKey]
    ours: list[str]


async def measure(bench: Bench, plan: Plan, keep: Callable[[Samples], object]) -> Measurement:
    """Everything, in one run. ``keep`` is told the figures so far."""
    samples: Samples = defaultdict(list)
    async with bench.systems(SYSTEMS) as systems:
        rows = await fan_out.run(bench, systems, _fan_outs(plan))
        names = {name: system.name for name, system in systems.items()}
        keys = _take_rows(rows, names, samples)
        keep(samples)
        keys |= await _first_tokens(bench, systems["ours"], plan, samples)
        keep(samples)
        await _steps(bench, systems, plan, samples)
        keep(samples)
    # A fresh process, whose budget these conversations fit: none is let go of while the next is counted.
    async with bench.systems(["engine"]) as systems:
        await _memory(bench, systems["engine"], plan, samples)
    return Measurement(samples, rows, keys, [names[name] for name in OURS])


def _fan_outs(plan: Plan) -> fan_out.Plan:
    skip = frozenset((name, 16) for name in SYSTEMS if name not in _AT_SIXTEEN)
    return fan_out.Plan(tokens=(plan.tokens,), adapters=(5, 16), rounds=plan.rounds, skip=skip)


def _take_rows(rows: Sequence[Row], names: dict[str, str], samples: Samples) -> dict[str, RowKey]:
    """Figures by the names that bars know, and the keys of the rows they come from."""
    keys: dict[str, RowKey] = {}
    known = {
        "peft_5": ("peft-lora", 5),
        "twins_5": ("ours-twins", 5),
        "ours_5": ("ours", 5),
        "ours_16": ("ours", 16),
        "engine_5": ("engine", 5),
        "llama_5": ("llama", 5),
        "llama_16": ("llama", 16),
        "llama_clients_5": ("llama-5", 5),
        "llama_clients_best_5": ("llama-5-best", 5),
        "llama_half_5": ("llama-f16", 5),
        "llama_half_16": ("llama-f16", 16),
    }
    for name, (system, adapters) in known.items():
        row = fan_out.find(rows, names[system], adapters)
        samples[name] = [sample.total_seconds for sample in row.samples]
        keys[name] = key_of(row)
    # However many adapters are asked afterwards, it is one prefill of that length.
    for name, system in (("prefill", "ours"), ("llama_prefill", "llama"), ("llama_half_prefill", "llama-f16")):
        its = [row for row in rows if row.system == names[system]]
        samples[name] = [rate for row in its for rate in row.details["prefill_tokens_per_second"]]
    return keys


async def _first_tokens(bench: Bench, ours: Any, plan: Plan, samples: Samples) -> dict[str, RowKey]:
    """One adapter: the prefix in the store but not in the worker, and in the worker at three lengths.

    Returns the keys of the answers that are compared.
    """
    keys: dict[str, RowKey] = {}
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
            if number == 1:
                keys[name] = key_of(Row(ours.name, len(prefix), (), what=name))
                bench.answers.keep(keys[name], ours, prefix, bench.adapters[0], answer)
        bench.progress.advance(task)
    bench.progress.remove_task(task)
    return keys


async def _steps(bench: Bench, systems: dict[str, Any], plan: Plan, samples: Samples) -> None:
    """Decode steps on one conversation: of the engine with 16 adapters, with 1, with none; and llama-server's."""
    engine, llama, half = systems["engine"], systems["llama"], systems["llama-f16"]
    prefix = bench.renderer.of_length(plan.tokens, seed=41)
    task = bench.progress.add_task("decode steps", total=1 + plan.rounds)
    for system in (engine, llama, half):
        await system.warm(prefix)
    for number in range(1 + plan.rounds):
        taken = {
            "step_16": await engine.step_seconds(prefix, bench.adapters, STEP_TOKENS),
            "step_1": await engine.step_seconds(prefix, bench.adapters[:1], STEP_TOKENS),
            # Both the mean over one answer, by the clock of the process that computes.
            "step_base": (await engine.ask(prefix, None, STEP_TOKENS)).token_seconds,
            "llama_step": (await llama.ask(prefix, None, STEP_TOKENS)).notes["step_seconds"],
            "llama_half_step": (await half.ask(prefix, None, STEP_TOKENS)).notes["step_seconds"],
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


def bars_table(results: Sequence[Result], correct: Mapping[str, Correct]) -> str:
    """The bars. The spread of a ratio is that of any round of the one figure against any of the other.

    Args:
        correct: by figure, whose answers were compared with PEFT's; the last column has those of a ratio's two.
    """
    rows = [
        [
            result.bar,
            f"{result.value:.2f} ({result.lowest:.2f}-{result.highest:.2f})",
            f"{result.sense} {result.limit:g}",
            "yes" if result.met else "**no**",
            "yes" if result.holds else "**no**",
            " / ".join(filter(None, (as_peft(correct.get(name)) for name in result.samples))),
        ]
        for result in results
    ]
    return markdown(("bar", "measured", "wanted", "met", "holds", "as PEFT"), rows, words=("bar", "wanted"))


def beside_table(told: Sequence[Beside], correct: Mapping[str, Correct]) -> str:
    """What is told beside the bars."""
    rows = [
        [
            ratio.what,
            f"{ratio.value:.2f} ({ratio.lowest:.2f}-{ratio.highest:.2f})",
            " / ".join(filter(None, (as_peft(correct.get(name)) for name in ratio.samples))),
        ]
        for ratio in told
    ]
    return markdown(("beside, without a limit", "measured", "as PEFT"), rows, words=("beside, without a limit",))


def keep_bars(name: str, samples: Samples) -> None:
    """Write the bars that there are figures for already."""
    write_json(name, as_json(evaluate(samples, measured(samples), answers_right=False), measured_on()))


def answers_right(judged: Mapping[RowKey, Correct], names: Collection[str]) -> bool:
    """Whether every answer of these systems was compared with PEFT's and is the same.

    What that means in each dtype is the judge's rule: see ``correctness.py``.
    """
    found = {system: [] for system in names}
    for (system, *_), correct in judged.items():
        if system in found:
            found[system].append(correct)
    return all(rows and all(row.of and row.equal == row.of for row in rows) for rows in found.values())


async def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Measure, compare answers with PEFT, write both files; whether all is as it must be."""
    plan = QUICK if arguments.quick else Plan(rounds=arguments.rounds)
    suffix = file_suffix(arguments)
    unfinished = (f"bars{suffix}-unfinished", f"bars-rows{suffix}-unfinished")
    with progress_on(console) as progress:
        bench = open_bench(
            console, progress, adapters=16, kind=arguments.kind, dtype=arguments.dtype, device=arguments.device
        )
        bench.facts |= {"dtype": bench.dtype, "model": bench.model.name, "adapters": arguments.kind}
        bench.keep = partial(write, unfinished[1], facts=bench.facts)
        measurement = await measure(bench, plan, partial(keep_bars, unfinished[0]))
        samples = measurement.samples
        judged = await bench.answers.judge(bench.model, bench.dtype, progress)
    rows = with_verdicts(measurement.rows, judged)
    right = answers_right(judged, measurement.ours)
    is_held = arguments.kind == "qkv"
    results = evaluate(samples, answers_right=right) if is_held else []
    told = beside(samples, bars_too=not is_held)
    bench.facts |= {"beside": [asdict(ratio) for ratio in told], "answers_right": right}
    path = write(f"bars-rows{suffix}", rows, bench.facts)
    if is_held:
        path = write_json(f"bars{suffix}", as_json(results, measured_on()))
    for name in unfinished:
        (OUTPUT / f"{name}.json").unlink(missing_ok=True)
    if not arguments.json:
        correct = {figure: judged[key] for figure, key in measurement.keys.items() if key in judged}
        print(f"\nFan-outs, {bench.dtype}: medians (smallest-largest), seconds\n")
        print(rows_table(rows, baseline=LLAMA["llama"].name, by="total_seconds", details=PREFILLS), end="\n\n")
        if results:
            print(bars_table(results, correct), end="\n\n")
        print(beside_table(told, correct), end="\n\n")
    if not right:
        console.print("Answers of ours were not those of cold PEFT: no bar holds in this run.")
    print(path)
    return right and all(result.holds for result in results)


def main() -> None:
    """Parse flags and run. With --check the exit status is 1 if a bar does not hold or an answer of ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after one warm-up; fewer for the slowest")
    parser.add_argument("--kind", choices=["qkv", "all-linear"], default="qkv", help="what the adapters adapt")
    parser.add_argument("--quick", action="store_true", help="512 tokens and one round, to see that all of it works")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every bar holds, with right answers")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    if not arguments.json:
        console.print(f"{describe_machine()}, SmolLM2-135M-Instruct")
    try:
        all_hold = asyncio.run(run(arguments, console))
    except (BuildError, ConfigError) as error:
        sys.exit(str(error))
    if arguments.check and not all_hold:
        sys.exit(1)


if __name__ == "__main__":
    main()
