"""``make bench-profile``: where the time goes of a step of 1, 5 and 16 sequences and of a prefill, by kind of work.

One engine in process, adapters of rank 32 on q, k and v, one conversation that all of them are asked about; the
prefills are of new ones of its length. Clocks stand around the engine's own calls (systems/step_timers.py); what they
cost shows in the last line, the same without them. Medians over all steps and prefills, milliseconds, into
build/bench/step-profile.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from command import run_command
from compare import progress_on
from harness import file_suffix, machine, write_json
from lineup import Bench, add_machine_flags, open_bench
from rich.console import Console
from systems.engine import EngineInProcess
from tables import figure, markdown

WITHOUT_CLOCKS = "the same without clocks"
ANSWER_TOKENS = 24

Profile = dict[str, list[float]]
"""Seconds by kind of work, one a step or prefill."""


async def measure(bench: Bench, tokens: int, sequences: list[int], rounds: int) -> tuple[dict[int, Profile], Profile]:
    """The profile of a step of each number of sequences, and that of a prefill; rounds alternate between them."""
    prefix = bench.renderer.of_length(tokens, seed=61)
    found: dict[int, Profile] = {count: {} for count in sequences}
    prefill: Profile = {}
    task = bench.progress.add_task("steps and prefills", total=(1 + rounds) * (len(sequences) + 1))
    async with bench.systems(["engine"]) as systems:
        engine = systems["engine"]
        if not isinstance(engine, EngineInProcess):
            raise TypeError(f"{engine.name} has no clocks")
        await engine.warm(prefix)
        for number in range(1 + rounds):
            for count, profile in found.items():
                adapters = bench.adapters[:count]
                timed = await engine.profile(prefix, adapters, ANSWER_TOKENS)
                bare = await engine.step_seconds(prefix, adapters, ANSWER_TOKENS)
                if number:
                    for kind, seconds in timed.items():
                        profile.setdefault(kind, []).extend(seconds)
                    profile.setdefault(WITHOUT_CLOCKS, []).append(bare)
                bench.progress.advance(task)
            new, other = (bench.renderer.of_length(tokens, seed=6_100 + 2 * number + place) for place in range(2))
            computed = {**await engine.profile_prefill(new), WITHOUT_CLOCKS: (await engine.warm(other)).seconds}
            if number:
                for kind, its in computed.items():
                    prefill.setdefault(kind, []).append(its)
            bench.progress.advance(task)
    bench.progress.remove_task(task)
    return found, prefill


def table_of(found: dict[str, Profile]) -> str:
    """A column for each profile, by its name; medians with the smallest and the largest, in milliseconds."""
    columns = ["milliseconds", *found]
    rows = [
        [kind, *(figure([1e3 * seconds for seconds in profile[kind]], 1) for profile in found.values())]
        for kind in next(iter(found.values()))
    ]
    return markdown(columns, rows, words=("milliseconds",))


async def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Measure, write, print."""
    tokens, rounds = (256, 1) if arguments.quick else (arguments.tokens, arguments.rounds)
    with progress_on(console) as progress:
        bench = open_bench(
            console, progress, adapters=max(arguments.sequences), dtype=arguments.dtype, device=arguments.device
        )
        steps, prefill = await measure(bench, tokens, arguments.sequences, rounds)
    content = {"tokens": tokens, "dtype": bench.dtype, "machine": machine(), "seconds": steps, "prefill": prefill}
    path = write_json(f"step-profile{file_suffix(arguments)}", content)
    if not arguments.json:
        columns = {f"{count} adapter{'s' if count > 1 else ''}": profile for count, profile in steps.items()}
        print(f"\nA decode step on {tokens:,} tokens, {bench.dtype}: medians (smallest-largest)\n")
        print(table_of(columns), end="\n\n")
        print(f"A prefill, {bench.dtype}, likewise\n")
        print(table_of({f"{tokens:,} tokens": prefill}), end="\n\n")
    return path


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the conversation")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 5, 16], help="each with another adapter")
    parser.add_argument("--rounds", type=int, default=5, help="answers of 24 tokens each, after one warm-up")
    parser.add_argument("--quick", action="store_true", help="256 tokens and one round, to see that all of it works")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    add_machine_flags(parser)
    run_command(run, parser.parse_args())


if __name__ == "__main__":
    main()
