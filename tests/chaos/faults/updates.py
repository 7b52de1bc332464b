"""Deployments that are replaced process by process while they serve: the same again, or with something new in them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from alora_serve.client import ChatMessage, SamplingParams
from deployment import TINY_CONTEXT_TOKENS, WORKER, Deployed, deployed, save_tiny_model
from faults.harness import CONVERSATIONS, DEFAULT, ONCE, QUICK, Chaos, Load, Row, Scenario, Tally, answers, questions
from faults.rounding import gaps, mistakes
from questions import Question, Read
from tiny_models import FAMILIES, TAU, save_model

PAUSE_SECONDS: Final = 1.0
TOKENS: Final = 40
LONG_DRAIN_SECONDS: Final = 20.0
"""Streams end where they began: of two releases, the second cannot always go on with what the first began."""
NEXT_RELEASE: Final = Path(__file__).parent / "next_release"


async def replaced(running: Deployed, load: Load, names: Sequence[str], environment: Mapping[str, str]) -> Tally:
    """One process after the other, then the router, while clients ask: once each, but of the router."""
    for retry, part in ((ONCE, names), (DEFAULT, ["router"])):
        async with load.running(retry) as tally:
            for name in part:
                await asyncio.sleep(PAUSE_SECONDS)
                tally.strike()
                await running.local.restart(name, environment=environment)
            await asyncio.sleep(2 * PAUSE_SECONDS)
    return load.tally


def endpoints(running: Deployed) -> tuple[str, ...]:
    """All processes but the router."""
    return (*running.local.prefill_names, *running.local.worker_names)


async def rolling_update(chaos: Chaos) -> list[Row]:
    """The same release again; answers are longer than a drain, so that streams go on elsewhere."""
    store = f"lmdb://{chaos.place('rolling update')}"
    async with deployed(chaos.model, store, workers=2, prefills=2, drain_seconds=2, **QUICK) as running:
        load = Load(running.local.router_address, await questions(running), chaos.rng("load"))
        tally = await replaced(running, load, endpoints(running), {})
        return [tally.row("rolling update", replaced=len(endpoints(running)) + 1)]


async def next_record_version(chaos: Chaos) -> list[Row]:
    """To a release that writes and reads another version of records, in the same store under the same names."""
    store = f"lmdb://{chaos.place('record version')}"
    path = os.pathsep.join([str(NEXT_RELEASE), *filter(None, [os.environ.get("PYTHONPATH")])])
    forgetful = {"prefix_cache_bytes": "1"}
    async with deployed(chaos.model, store, workers=2, prefills=2, drain_seconds=2, **forgetful, **QUICK) as running:
        load = Load(running.local.router_address, await questions(running, TOKENS), chaos.rng("load"))
        # The worker first, while all that is stored is the old release's.
        order = (WORKER, *(name for name in endpoints(running) if name != WORKER))
        tally = await replaced(running, load, order, {"PYTHONPATH": path})
        misses = await running.metric(WORKER, "alora_store_miss_blocks_total", reason="version")
        tally.expect(misses > 0, "no record of the other version was met")
        return [tally.row("rolling update to another record version", version_misses=misses)]


async def next_model(chaos: Chaos) -> list[Row]:
    """To another revision of the model, by clients who send conversations: each answer is wholly one model's."""
    place = chaos.place("next model")
    config = FAMILIES["llama"]()
    config.max_position_embeddings = TINY_CONTEXT_TOKENS
    other = replace(chaos.model, directory=save_model(place / "revision", config, seed=1))
    async with deployed(chaos.model, f"lmdb://{place}/first", **QUICK) as running:
        first = await questions(running, TOKENS, by_handle=False)
    async with deployed(other, f"lmdb://{place}/second", **QUICK) as running:
        second = await answers(running, first)
    seen = {"first": 0, "second": 0}

    def is_the_seconds(question: Question, found: Read) -> bool:
        is_right = found.is_same_as(second[question])
        seen["second"] += is_right
        return is_right

    async with deployed(
        chaos.model,
        f"lmdb://{place}/both",
        workers=2,
        prefills=2,
        drain_seconds=LONG_DRAIN_SECONDS,
        **QUICK,
    ) as running:
        load = Load(running.local.router_address, first, chaos.rng("load"), accept=is_the_seconds)
        # One of each service first, so that either model has both throughout.
        order = ["prefill-2", "worker-2", "prefill", "worker-1"]
        tally = await replaced(running, load, order, {"ALORA_MODEL": str(other.directory)})
        seen["first"] = len(tally.answered) - tally.wrong - seen["second"]
        tally.expect(all(seen.values()), f"only one of two models answered: {seen}")
        return [tally.row("rolling update to another model", **seen)]


async def mixed_dtypes(chaos: Chaos) -> list[Row]:
    """From float32 to bfloat16: no service reads the other's KV, and every token is right by the τ rule."""
    place = chaos.place("mixed dtypes")
    model = save_tiny_model(place, is_moderate=True)
    async with deployed(
        model, f"lmdb://{place}/kv", workers=2, prefills=2, drain_seconds=2, prefix_cache_bytes="1", **QUICK
    ) as running:
        greedy = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        handles = [(await running.client.prefill((ChatMessage("user", text),))).handle for text in CONVERSATIONS]
        asked = [Question(handle, name, greedy) for handle in handles for name in (model.appended, model.answering)]
        others: list[tuple[Question, Read]] = []

        def judged_later(question: Question, found: Read) -> bool:
            others.append((question, found))
            return found.starts == 1 and len(found.tokens) == TOKENS

        expected = await answers(running, asked)
        load = Load(running.local.router_address, expected, chaos.rng("load"), accept=judged_later)
        tally = await replaced(running, load, endpoints(running), {"ALORA_DTYPE": "bfloat16"})
    largest = await asyncio.to_thread(gaps, model, others)
    tally.wrong += sum(gap > TAU for gap in largest)
    tally.expect(bool(others), "no answer was bfloat16's own")
    wrong = await asyncio.to_thread(mistakes, model, asked)
    tally.expect(min(wrong.values()) > TAU, f"the rule does not tell mistakes: {wrong}")
    details = {"rounded_answers": len(others), "largest_gap": round(max(largest, default=0.0), 3)}
    smallest = {mistake: round(gap, 2) for mistake, gap in wrong.items()}
    return [tally.row("rolling update to another dtype", **details, **smallest)]


SCENARIOS: Final[dict[str, Scenario]] = {
    "rolling update": rolling_update,
    "record version": next_record_version,
    "next model": next_model,
    "mixed dtypes": mixed_dtypes,
}
