"""``make bench-sealed``: what ``store_protection`` costs, against none, in one run on this machine.

Twice: the store alone (an LMDB, values of a megabyte, bytes a second written and read), and through the whole gRPC
path (first token of an adapter whose conversation is in the store but not in the worker). Rounds alternate.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, Literal, get_args

from command import run_command
from compare import progress_on
from conversations import Renderer
from correctness import Answers, key_of, with_verdicts
from harness import Row, Sample, write
from main import ADAPTERS, ANSWER_TOKENS, adapter_in
from rich.console import Console
from rich.progress import Progress
from store_rates import write_and_read
from systems.served import Deployed, Served, empty_store
from tables import figure, markdown, rows_table

from alora_serve.cli.local.deployment import DeploymentOptions
from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.sealed import Protection, SealedStore
from alora_serve.kv.store import KVStore
from alora_serve.model.demo_model import ensure_demo_model

DTYPE: Final = "float32"
SECRET = "the secret of this benchmark's store"
PROTECTIONS: tuple[Protection, ...] = get_args(Protection)
VALUE_BYTES = 1 << 20
Figure = Literal["write", "read"]


def store_of(protection: Protection, url: str) -> KVStore:
    """A bare store with that protection."""
    bare = LmdbStore(Path(url.removeprefix("lmdb://")), budget_bytes=1 << 30)
    return bare if protection == "none" else SealedStore(bare, protection, (SECRET.encode(),))


def measure_stores(rounds: int) -> dict[Protection, dict[Figure, list[float]]]:
    """Bytes a second of writing and reading, by protection, one a round."""
    rates: dict[tuple[Protection, Figure], list[float]] = defaultdict(list)
    value = os.urandom(VALUE_BYTES)
    for protection in PROTECTIONS * (rounds + 1):
        with empty_store() as url:
            store = store_of(protection, url)
            for kind, rate in zip(get_args(Figure), write_and_read(store, value), strict=True):
                rates[protection, kind].append(rate)
            store.close()
    return {protection: {kind: rates[protection, kind][1:] for kind in get_args(Figure)} for protection in PROTECTIONS}


async def measure_first_tokens(tokens: int, rounds: int, progress: Progress) -> list[Row]:
    """A row a protection: the KV in the store, not in the worker. Its answers are compared with cold PEFT's."""
    model, adapter, answers = ensure_demo_model(), adapter_in(ADAPTERS), Answers()
    renderer = Renderer(model)
    samples: dict[Protection, list[Sample]] = defaultdict(list)
    fetched: dict[Protection, int] = {}
    task = progress.add_task("first tokens", total=(rounds + 1) * len(PROTECTIONS))
    async with AsyncExitStack() as stack:
        running: dict[Protection, Served] = {}
        for protection in PROTECTIONS:
            settings = {"store_protection": protection, "store_secrets": SECRET, "always_fetch": "true"}
            options = DeploymentOptions(adapter_roots=(ADAPTERS,), dtype=DTYPE, settings=settings)
            running[protection] = Served(await stack.enter_async_context(Deployed(options, [adapter])))
        for number in range(rounds + 1):
            prefix = renderer.of_length(tokens, seed=tokens + number)
            for protection, system in running.items():
                await system.warm(prefix)
                answer = await system.ask(prefix, adapter, ANSWER_TOKENS)
                fetched[protection] = int(answer.notes["fetched_bytes"])
                samples[protection].append(Sample(answer.first_token_seconds, answer.total_seconds))
                if number == 1:
                    answers.keep(key_of(Row(protection, tokens, ())), system, prefix, adapter, answer)
                progress.advance(task)
    progress.remove_task(task)
    rows = [Row(name, tokens, tuple(samples[name][1:]), fetched[name]) for name in PROTECTIONS]
    return with_verdicts(rows, await answers.judge(model, DTYPE, progress))


async def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Measure, write, print."""
    with progress_on(console) as progress:
        rates = measure_stores(arguments.rounds)
        rows = await measure_first_tokens(arguments.tokens, arguments.rounds, progress)
    facts = {"dtype": DTYPE, "store_bytes_per_second": {name: dict(found) for name, found in rates.items()}}
    path = write("sealed", rows, facts)
    if not arguments.json:
        gigabytes = [
            [name, *(figure([rate / 1e9 for rate in found[kind]], 2) for kind in get_args(Figure))]
            for name, found in rates.items()
        ]
        print("\nThe store alone, GB/s: medians (smallest-largest)\n")
        print(markdown(("protection", *get_args(Figure)), gigabytes, words=("protection",)))
        print(f"\nFirst token from the store, {DTYPE}: medians (smallest-largest), seconds\n")
        print(rows_table(rows, baseline="none"), end="\n\n")
    return path


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the conversation")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds after one warm-up")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    run_command(run, parser.parse_args())


if __name__ == "__main__":
    main()
