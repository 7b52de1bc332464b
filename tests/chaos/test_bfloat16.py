"""In bfloat16 a stream that goes on at another worker is right as far as rounding goes: no token is further off."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from faults.updates import gaps

from alora_serve.client import ChatMessage, SamplingParams
from deployment import BLOCK_TOKENS, PATIENCE_SECONDS, Deployed, deployed, save_tiny_model
from questions import Question, read

TURNS = (ChatMessage("user", "The kettle sings, and the tea is made. Who made the tea?"),)
TOKENS = 200
"""Of an answer that a fault finds in the middle."""


async def kill_the_holder(running: Deployed) -> None:
    """SIGKILL of the worker that runs the one stream there is."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            for name in running.local.worker_names:
                async with aclosing(running.statuses(name)) as statuses:  # type: ignore[type-var]
                    if (await anext(statuses)).running:
                        await running.local.kill(name)
                        return


@pytest.mark.timeout(300)
async def test_a_stream_in_bfloat16_survives_the_death_of_its_worker(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    settings = {"block_tokens": str(BLOCK_TOKENS)}
    async with deployed(model, f"lmdb://{tmp_path}/kv", workers=2, dtype="bfloat16", **settings) as running:
        assert (await running.client.get_model()).dtype == "bfloat16"
        question = Question((await running.client.prefill(TURNS)).handle, "guard", sampling)
        base = await read(running.client, replace(question, adapter=""))
        found = await read(running.client, question, then=lambda: kill_the_holder(running))
        assert await running.metric("router", "alora_router_resumed_streams_total") == 1
    assert (len(found.tokens), found.starts) == (TOKENS, 1)
    answers = [(question, answer) for answer in (found, replace(found, tokens=base.tokens))]
    (right, wrong), tau = await asyncio.to_thread(gaps, model, answers, [question], TOKENS)
    assert right <= tau
    assert wrong > tau, "it tells the adapter from the base model"
