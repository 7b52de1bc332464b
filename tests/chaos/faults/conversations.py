"""Conversations that nobody has begun before, while something breaks; stock transformers judges every answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import torch

from alora_serve.client import PrefixHandle, SamplingParams
from alora_serve.errors import AloraServeError
from deployment import Deployed, ServedModel
from faults.harness import ANSWER_SECONDS, Tally
from questions import Question
from tiny_models import forced_gaps, load_reference

SHORT_ANSWER: Final = SamplingParams(max_tokens=8, ignore_eos=True)
NEARLY_EQUAL: Final = 1e-3
"""Logits of the best token and the next: closer, and rounding, which differs with the split of a prompt, chooses."""


@asynccontextmanager
async def new_conversations(
    running: Deployed, known: Iterable[Question] = (), *, prompt_tokens: int = 82, clients: int = 1
) -> AsyncIterator[Tally]:
    """Clients that begin one conversation after the other while the block runs, and what they saw.

    Each is answered, greedily, by the base model; what was wrong is known when the block has been left. They warm the
    ``known`` ones again in between, so that what a store has lost comes back.
    """
    tally, numbers, stop = Tally(), itertools.count(), asyncio.Event()
    handles = [question.about for question in known if isinstance(question.about, PrefixHandle)]
    answered: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    async def begin(number: int) -> None:
        tally.requests += 1
        began = time.monotonic()
        try:
            if handles and number % 2:
                handle = handles[number // 2 % len(handles)]
                await running.client.prefill(handle=handle, timeout_seconds=ANSWER_SECONDS)
            else:
                prompt = new_prompt(number, prompt_tokens)
                stream = running.client.generate(
                    token_ids=prompt, sampling=SHORT_ANSWER, timeout_seconds=ANSWER_SECONDS
                )
                answered.append((prompt, (await stream.result()).token_ids))
        except AloraServeError as error:
            tally.failures.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.05)
        else:
            tally.answered.append((began, time.monotonic()))

    async def begin_until_stopped() -> None:
        while not stop.is_set():
            await begin(next(numbers))

    beginning = [asyncio.create_task(begin_until_stopped()) for _ in range(clients)]
    try:
        yield tally
        await tally.recovered()
    finally:
        stop.set()
        await asyncio.gather(*beginning)
        tally.wrongs += await asyncio.to_thread(wrong_answers, running.model, answered)
        tally.wrong = len(tally.wrongs)


def new_prompt(number: int, tokens: int) -> tuple[int, ...]:
    """Another one for each number below 40,000, from its first block on."""
    return 5 + number % 200, 5 + number // 200 % 200, *(10 + place % 80 for place in range(tokens - 2))


def new_text(number: int, most_tokens: int) -> str:
    """A prompt as text, another one for each number, of as many bytes as it may come to tokens."""
    return f"{number} {'xqjzvkw ' * (most_tokens // 8)}"[:most_tokens]


def wrong_answers(model: ServedModel, answered: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """Those of the base model that are not what stock transformers says greedily, in float32 and from nothing."""
    torch.set_num_threads(1)
    reference = load_reference(model.directory)
    wrong = []
    for prompt, tokens in answered:
        below = forced_gaps(reference, prompt, tokens, None)
        if len(tokens) != SHORT_ANSWER.max_tokens:
            wrong.append(f"new conversation: {len(tokens)} tokens")
        elif below.max() > NEARLY_EQUAL:
            wrong.append(f"new conversation: token {int(below.argmax())} lies {float(below.max()):.3f} below the best")
    return wrong
