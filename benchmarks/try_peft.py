"""``make bench-peft``: which of its settings stock PEFT is fastest with, here: the peers' rows should use those.

Five adapters about one conversation, as plain LoRAs that compute it for each adapter and as aLoRAs that continue its
cache: one after another, or in one batch of mixed adapters; with threads that spin or sleep while they wait; with an
allocator that keeps memory or gives it back (systems/peft_settings.py).

Each setting has a process of its own, one after another, so trust differences that are larger than the spread. What was
found fastest is LORA and ALORA in systems/peft_settings.py. Into build/bench/peft-settings.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean

from command import run_command
from compare import progress_on
from correctness import key_of, with_verdicts
from harness import Row, Sample, file_suffix, write
from lineup import Bench, add_machine_flags, open_bench
from rich.console import Console
from systems.peft import PeftAlora, PeftLora
from systems.peft_settings import AS_IN_TABLES, trials
from tables import rows_table

KINDS: dict[str, type[PeftLora]] = {"plain LoRA": PeftLora, "aLoRA": PeftAlora}
ADAPTERS = 5
ANSWER_TOKENS = 16


async def measure(bench: Bench, kinds: Sequence[str], tokens: int, rounds: int) -> list[Row]:
    """A row for each setting; the first round of each is a warm-up."""
    rows: list[Row] = []
    task = bench.progress.add_task("settings", total=sum(len(trials(KINDS[kind].best)) for kind in kinds))
    for kind in kinds:
        for name, settings in trials(KINDS[kind].best).items():
            row = Row(name, tokens, (), what=kind, adapters=ADAPTERS)
            samples = []
            async with KINDS[kind](bench.model, bench.dtype, bench.adapters, bench.device, settings) as peft:
                for number in range(1 + rounds):
                    prefix = bench.renderer.of_length(tokens, seed=13_000 + number)
                    await peft.warm(prefix)
                    found = await peft.fan_out(prefix, bench.adapters, ANSWER_TOKENS)
                    if number:
                        first = mean(answer.first_token_seconds for answer in found.answers)
                        samples.append(Sample(first, found.total_seconds))
                    if number == 1:
                        for adapter, answer in zip(bench.adapters, found.answers, strict=True):
                            bench.answers.keep(key_of(row), peft, prefix, adapter, answer)
            rows.append(Row(name, tokens, tuple(samples), what=kind, adapters=ADAPTERS))
            bench.keep(rows)
            bench.progress.advance(task)
    bench.progress.remove_task(task)
    return rows


async def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Try all, compare answers with PEFT run cold, write, print."""
    tokens, rounds = (256, 1) if arguments.quick else (arguments.tokens, arguments.rounds)
    name = f"peft-settings{file_suffix(arguments)}"
    with progress_on(console) as progress:
        bench = open_bench(console, progress, adapters=ADAPTERS, dtype=arguments.dtype, device=arguments.device)
        bench.facts |= {
            "dtype": bench.dtype,
            "model": bench.model.name,
            "settings": {
                kind: {name: asdict(settings) for name, settings in trials(KINDS[kind].best).items()} for kind in KINDS
            },
        }
        bench.keep = partial(write, name, facts=bench.facts)
        rows = await measure(bench, arguments.kinds, tokens, rounds)
        rows = with_verdicts(rows, await bench.answers.judge(bench.model, bench.dtype, progress))
    path = write(name, rows, bench.facts | {"fastest": fastest(rows)})
    if not arguments.json:
        print(f"\nPEFT's settings, {bench.dtype}: medians (smallest-largest), seconds\n")
        print(rows_table(rows, baseline=AS_IN_TABLES, by="total_seconds"), end="\n\n")
        for kind, setting in fastest(rows).items():
            print(f"fastest, {kind}: {setting}")
    return path


def fastest(rows: Sequence[Row]) -> dict[str, str]:
    """Of each kind the setting whose fan-out is soonest done, among those with right answers alone."""
    right = [row for row in rows if row.correct and row.correct.equal == row.correct.of]
    kinds = dict.fromkeys(row.what for row in right)
    return {
        kind: min((row for row in right if row.what == kind), key=lambda row: row.median("total_seconds")).system
        for kind in kinds
    }


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: both")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the conversations")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds after one warm-up")
    parser.add_argument("--quick", action="store_true", help="256 tokens and one round, to see that all of it works")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    run_command(run, parser.parse_args())


if __name__ == "__main__":
    main()
