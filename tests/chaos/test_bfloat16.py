"""In bfloat16 a stream that goes on at another worker is right by the τ rule of docs/exactness.md."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from faults.rounding import gaps, mistakes

from alora_serve.client import ChatMessage, SamplingParams
from deployment import BLOCK_TOKENS, PATIENCE_SECONDS, Deployed, deployed, save_tiny_model
from questions import Question, read
from tiny_models import TAU

TURNS = (ChatMessage("user", "The kettle sings, and the tea is made. Who made the tea?"),)
OTHER_TURNS = (ChatMessage("user", "Bread is made of flour, water, salt and time. What is it made of?"),)
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
    model = save_tiny_model(tmp_path, is_moderate=True)
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    settings = {"block_tokens": str(BLOCK_TOKENS)}
    async with deployed(model, f"lmdb://{tmp_path}/kv", workers=2, dtype="bfloat16", **settings) as running:
        assert (await running.client.get_model()).dtype == "bfloat16"
        handles = [(await running.client.prefill(turns)).handle for turns in (TURNS, OTHER_TURNS)]
        asked = [Question(handle, "answer", sampling) for handle in handles]
        found = await read(running.client, asked[0], then=lambda: kill_the_holder(running))
        assert await running.metric("router", "alora_router_resumed_streams_total") == 1
    assert (len(found.tokens), found.starts) == (TOKENS, 1)
    [largest] = await asyncio.to_thread(gaps, model, [(asked[0], found)])
    assert largest <= TAU
    wrong = await asyncio.to_thread(mistakes, model, asked)
    assert min(wrong.values()) > TAU, wrong
