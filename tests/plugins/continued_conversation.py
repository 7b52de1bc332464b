"""The conversation of examples/rag_guard: asked as a fan-out, answered, and asked again a turn later."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from alora_serve.client import AsyncClient, ChatMessage, GenerationResult, PrefixHandle
from alora_serve.errors import AloraServeError
from deployment import GREEDY, PATIENCE_SECONDS, ServedModel

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "rag_guard" / "harvard.json"
NEXT_QUESTION = "Who is it named after?"


async def continued(client: AsyncClient, model: ServedModel) -> None:
    """Fails unless both turns are answered as PEFT answers them, and the second reuses all that the first computed."""
    turns = [ChatMessage(turn["role"], turn["content"]) for turn in json.loads(EXAMPLE.read_text())["messages"]]
    names = (model.appended, model.plain, "")
    first = (await client.prefill(turns)).handle
    answers = await _fan_out(client, names, first)

    turns += [ChatMessage("assistant", answers[-1].text), ChatMessage("user", NEXT_QUESTION)]
    prefilled = await client.prefill(turns)
    kept = len(first.prefix_tokens)
    assert prefilled.usage.cached_tokens >= kept
    assert prefilled.usage.computed_tokens < kept / 4
    async with asyncio.timeout(PATIENCE_SECONDS):  # on a busy machine, a store may be taken for slow or away at first
        while True:
            again = await _fan_out(client, names, prefilled.handle)
            if all(answer.usage.cached_tokens >= kept for answer in (again[0], again[-1])):
                break
            await asyncio.sleep(1)

    asked = [(name, model.prompt(handle, name)) for handle in (first, prefilled.handle) for name in names]
    assert [answer.token_ids for answer in (*answers, *again)] == model.cold_answers(asked)


async def _fan_out(client: AsyncClient, names: tuple[str, ...], handle: PrefixHandle) -> list[GenerationResult]:
    answers: list[GenerationResult] = []
    for answer in await client.fanout(None, names, sampling=GREEDY, handle=handle).results():
        if isinstance(answer, AloraServeError):
            raise answer
        answers.append(answer)
    return answers
