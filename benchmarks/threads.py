"""``make bench-threads``: what thread counts, waiting threads and allocators cost or bring, here.

The engine in a process of its own, alone and as two processes at once on the same cores, as base prefill and a worker
are on one machine: prefill of a new conversation and the mean step of one base sequence on it. Each setting has
processes of its own, one setting after another, so trust differences that are larger than the spread.

Then the store: values of one part to a Valkey (or Redis) and back, through our client, with jemalloc as it is and told
to keep memory (allocators.py). Into build/bench/threads.json; which settings were chosen is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from allocators import StoreRates, measure_server, servers
from command import run_command
from compare import progress_on
from correctness import key_of, with_verdicts
from harness import Row, Sample, file_suffix, write
from lineup import Bench, add_machine_flags, open_bench
from process_settings import thread_settings
from rich.console import Console
from systems.engine import EngineInProcess
from tables import figure, markdown, rows_table

from alora_serve.cli.local.machine import service_environment
from alora_serve.types import TokenIds

ANSWER_TOKENS = 32
DETAILS: Final[Mapping[str, tuple[str, int]]] = {
    "prefill, tokens/s": ("prefill_tokens_per_second", 0),
    "step, ms": ("step_milliseconds", 1),
}
ALONE, TWO = "alone", "two at once"


@dataclass(frozen=True, slots=True)
class Setting:
    """How a process computes.

    Attributes:
        threads: torch's.
        sleep: those that wait sleep (``OMP_WAIT_POLICY=passive``); by OpenMP's own choice they spin for a while.
        keeps_memory: glibc keeps what was freed, instead of giving large buffers back to the system.
    """

    threads: int
    sleep: bool = True
    keeps_memory: bool = True

    @property
    def name(self) -> str:
        """As in the table."""
        waiting = "asleep" if self.sleep else "spinning"
        memory = "kept" if self.keeps_memory else "given back"
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}, {waiting} while waiting, memory {memory}"

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` with these settings, whatever it says of them."""
        rest = {name: base[name] for name in base.keys() - thread_settings(base).keys()}
        found = service_environment(rest, threads=self.threads)
        unset = set() if self.sleep else {"OMP_WAIT_POLICY"}
        unset |= set() if self.keeps_memory else {name for name in found if name.startswith("MALLOC_")}
        return {name: value for name, value in found.items() if name not in unset}


SETTINGS: Final = (Setting(1), Setting(2), Setting(2, sleep=False), Setting(2, keeps_memory=False))


@dataclass(frozen=True, slots=True)
class Measured:
    """One process in one round: tokens a second of a prefill, then an answer of the base model."""

    prefill: float
    sample: Sample
    step_seconds: float


async def measure(bench: Bench, settings: Sequence[Setting], tokens: int, rounds: int) -> list[Row]:
    """Two rows for each setting; rounds alternate between one process and two."""
    rows: list[Row] = []
    task = bench.progress.add_task("threads", total=len(settings) * (1 + rounds) * 2)
    for setting in settings:
        found: dict[str, list[Measured]] = defaultdict(list)
        async with _engine(bench, setting) as one, _engine(bench, setting) as other:
            bench.note(setting.name, one)
            for number in range(1 + rounds):
                seed = 30_000 + 10 * number
                prefixes = [bench.renderer.of_length(tokens, seed=seed + index) for index in range(3)]
                alone = [await _ask(bench, one, prefixes[0], setting, ALONE, keeps=number == 1)]
                bench.progress.advance(task)
                both = await asyncio.gather(
                    _ask(bench, one, prefixes[1], setting, TWO, keeps=number == 1),
                    _ask(bench, other, prefixes[2], setting, TWO, keeps=number == 1),
                )
                bench.progress.advance(task)
                if number:
                    found[ALONE] += alone
                    found[TWO] += both
        rows += [_row(setting, what, tokens, measured) for what, measured in found.items()]
        bench.keep(rows)
    bench.progress.remove_task(task)
    return rows


def _engine(bench: Bench, setting: Setting) -> EngineInProcess:
    return EngineInProcess(bench.model, bench.dtype, bench.adapters, bench.device, environment=setting.environment)


async def _ask(
    bench: Bench, engine: EngineInProcess, prefix: TokenIds, setting: Setting, what: str, *, keeps: bool
) -> Measured:
    warmed = await engine.warm(prefix)
    answer = await engine.ask(prefix, None, ANSWER_TOKENS)
    if keeps:
        key = key_of(Row(setting.name, len(prefix), (), what=what))
        bench.answers.keep(key, engine, prefix, None, answer)
    sample = Sample(answer.first_token_seconds, answer.total_seconds)
    return Measured(warmed.computed_tokens / warmed.seconds, sample, answer.token_seconds)


def _row(setting: Setting, what: str, tokens: int, measured: Sequence[Measured]) -> Row:
    details = {
        "prefill_tokens_per_second": [one.prefill for one in measured],
        "step_milliseconds": [1e3 * one.step_seconds for one in measured],
    }
    return Row(setting.name, tokens, tuple(one.sample for one in measured), what=what, details=details)


def store_table(found: Sequence[StoreRates]) -> str:
    """A line for each server and setting of its allocator."""
    columns = ("server", "freed memory", "write, GB/s", "read, GB/s")
    rows = [
        [
            rates.server,
            "kept" if rates.keeps_memory else "as it is",
            *(figure([rate / 1e9 for rate in measured], 2) for measured in (rates.write, rates.read)),
        ]
        for rates in found
    ]
    return markdown(columns, rows, words=columns[:2])


async def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Measure, compare answers with PEFT, write, print."""
    tokens, rounds = (256, 1) if arguments.quick else (arguments.tokens, arguments.rounds)
    name = f"threads{file_suffix(arguments)}"
    with progress_on(console) as progress:
        bench = open_bench(console, progress, adapters=1, dtype=arguments.dtype, device=arguments.device)
        bench.facts |= {"dtype": bench.dtype, "model": bench.model.name}
        bench.keep = partial(write, name, facts=bench.facts)
        rows = await measure(bench, SETTINGS, tokens, rounds)
        rows = with_verdicts(rows, await bench.answers.judge(bench.model, bench.dtype, progress))
        stores = [
            await asyncio.to_thread(measure_server, program, rounds, keeps_memory=keeps)
            for program in servers()
            for keeps in (False, True)
        ]
    path = write(name, rows, bench.facts | {"store_bytes_per_second": [asdict(rates) for rates in stores]})
    if not arguments.json:
        print(f"\nThreads and allocators, {bench.dtype}: medians (smallest-largest), seconds\n")
        print(rows_table(rows, baseline="", details=DETAILS))
        print("\nA store's allocator, values of one part\n")
        print(store_table(stores), end="\n\n")
    return path


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the conversations")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after one warm-up")
    parser.add_argument("--quick", action="store_true", help="256 tokens and one round, to see that all of it works")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    run_command(run, parser.parse_args())


if __name__ == "__main__":
    main()
