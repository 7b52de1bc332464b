"""``make bench-llama``: which of its settings llama-server is fastest with, here: the peers' rows should use those.

Three ways to ask it, each with a list of settings (systems/llama_trials.py):
  serial   five adapters about one conversation, one after another, of one slot
  five     the same by five clients at once
  eight    eight conversations by eight clients at once, two adapters each

Each setting has a server of its own, one after another, so trust differences that are larger than the spread. What was
found best is written down in docs/adr/0015 and systems/llama_settings.py. Into build/bench/llama-settings.json.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter

from command import run_command
from compare import progress_on
from correctness import key_of, with_verdicts
from harness import Row, Sample, file_suffix, write
from lineup import Bench, add_machine_flags, open_bench
from rich.console import Console
from systems.base import Answer, System
from systems.llama_trials import AS_IN_TABLES, TRIALS
from tables import PREFILLS, rows_table

from alora_serve.types import TokenIds

CLIENTS = 8
QUESTIONS = 2
"""Of each of the eight clients, one after another."""
ADAPTERS = 5
ANSWER_TOKENS = 16


async def ask_fan_out(bench: Bench, system: System, tokens: int, number: int, row: Row) -> tuple[Sample, float]:
    """Five adapters on a new conversation: the fan-out, and prefilled tokens a second."""
    prefix = bench.renderer.of_length(tokens, seed=11_000 + number)
    warmed = await system.warm(prefix)
    answers = await system.fan_out(prefix, bench.adapters, ANSWER_TOKENS)
    if not number:
        for adapter, answer in zip(bench.adapters, answers.answers, strict=True):
            bench.answers.keep(key_of(row), system, prefix, adapter, answer)
    rate = warmed.computed_tokens / warmed.seconds if warmed.seconds else 0.0
    return Sample(mean(answer.first_token_seconds for answer in answers.answers), answers.total_seconds), rate


async def ask_clients(bench: Bench, system: System, tokens: int, number: int, row: Row) -> tuple[Sample, float]:
    """Eight clients, each with a conversation that has been asked about before."""
    prefixes = [bench.renderer.of_length(tokens, seed=12_000 + client) for client in range(CLIENTS)]
    if not number:
        for prefix in prefixes:
            await system.warm(prefix)
            await system.ask(prefix, bench.adapters[0], 1)

    async def client(index: int, prefix: TokenIds) -> list[Answer]:
        chosen = [bench.adapters[(index + number + turn) % ADAPTERS] for turn in range(QUESTIONS)]
        answers = [await system.ask(prefix, adapter, ANSWER_TOKENS) for adapter in chosen]
        if not number:
            for adapter, answer in zip(chosen, answers, strict=True):
                bench.answers.keep(key_of(row), system, prefix, adapter, answer)
        return answers

    began = perf_counter()
    found = await asyncio.gather(*(client(index, prefix) for index, prefix in enumerate(prefixes)))
    total = perf_counter() - began
    return Sample(mean(answer.first_token_seconds for answers in found for answer in answers), total), 0.0


async def measure(bench: Bench, ways: Sequence[str], tokens: int, rounds: int) -> list[Row]:
    """A row for each setting; the first round of each is a warm-up."""
    rows: list[Row] = []
    task = bench.progress.add_task("settings", total=sum(len(TRIALS[way]) for way in ways))
    for way in ways:
        for settings in TRIALS[way]:
            row = Row(settings.name, tokens, (), what=way, adapters=ADAPTERS)
            ask = ask_clients if way == "eight" else ask_fan_out
            async with bench.llama(settings) as system:
                taken = [await ask(bench, system, tokens, number, row) for number in range(1 + rounds)]
            rates = [rate for _, rate in taken[1:] if rate]
            details = {"prefill_tokens_per_second": rates} if rates else {}
            samples = tuple(sample for sample, _ in taken[1:])
            rows.append(Row(row.system, tokens, samples, what=way, adapters=ADAPTERS, details=details))
            bench.keep(rows)
            bench.progress.advance(task)
    bench.progress.remove_task(task)
    return rows


async def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Try all, compare answers with PEFT, write, print."""
    tokens, rounds = (256, 1) if arguments.quick else (arguments.tokens, arguments.rounds)
    name = f"llama-settings{file_suffix(arguments)}"
    with progress_on(console) as progress:
        bench = open_bench(console, progress, adapters=ADAPTERS, dtype=arguments.dtype, device=arguments.device)
        bench.keep = partial(write, name, facts=bench.facts)
        rows = await measure(bench, arguments.ways, tokens, rounds)
        if not arguments.no_check:
            rows = with_verdicts(rows, await bench.answers.judge(bench.model, bench.dtype, progress))
    path = write(name, rows, {"dtype": bench.dtype, "model": bench.model.name, **bench.facts})
    if not arguments.json:
        print(f"\nllama-server's settings, {bench.dtype}: medians (smallest-largest), seconds\n")
        print(rows_table(rows, baseline=AS_IN_TABLES, by="total_seconds", details=PREFILLS), end="\n\n")
    return path


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(TRIALS), default=list(TRIALS), help="default: all")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the conversations")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds after one warm-up")
    parser.add_argument("--no-check", action="store_true", help="do not compare answers with PEFT's")
    parser.add_argument("--quick", action="store_true", help="256 tokens and one round, to see that all of it works")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    run_command(run, parser.parse_args())


if __name__ == "__main__":
    main()
