"""Runs what a request asks for on a router, and puts each choice together as its events come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from alora_serve.client import (
    AsyncClient,
    Finished,
    FinishReason,
    Prompt,
    SamplingParams,
    Started,
    StreamEvent,
    TokenChunk,
)
from alora_serve.errors import AloraServeError
from alora_serve.types import TokenLogprob
from openai_front.field_names import as_asked


@dataclass(frozen=True, slots=True)
class Question:
    """All that a request asks.

    Attributes:
        prompts: each is answered apart.
        adapter: who answers; empty is the base model.
        samples: answers to each prompt.
        field_names: what the request has for fields of the gRPC API, where it is not the same.
    """

    prompts: Sequence[Prompt]
    adapter: str
    sampling: SamplingParams
    samples: int
    field_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        """Answers in all. Choice ``i`` answers prompt ``i // samples``."""
        return len(self.prompts) * self.samples


@dataclass(slots=True)
class Answer:
    """One choice, as far as it has come."""

    started: Started | None = None
    finished: Finished | None = None
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    top_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)

    def add(self, event: StreamEvent) -> str:
        """Note an event; the text that it adds."""
        match event:
            case Started():
                self.started = event
                return ""
            case TokenChunk():
                parts = zip(event.token_ids, event.logprobs, event.token_bytes, strict=False)
                self.tokens += [TokenLogprob(*part) for part in parts]
                self.top_logprobs += event.top_logprobs
                text = event.text
            case Finished():
                self.finished = event
                text = event.text
            case _:
                return ""
        self.text += text
        return text

    @property
    def is_cut(self) -> bool:
        """It ended for its length."""
        return self.finished is not None and self.finished.finish_reason is FinishReason.LENGTH


async def run(client: AsyncClient, question: Question) -> AsyncGenerator[tuple[int, StreamEvent]]:
    """The events of all choices as they come, each with its choice's index.

    Leaving the iterator cancels what still runs.

    Raises:
        AloraServeError: one of them failed, told in the request's words; the others are cancelled.
    """
    try:
        async with aclosing(_of_prompts(client, question)) as events:
            async for item in events:
                yield item
    except AloraServeError as error:
        raise as_asked(error, question.field_names) from error


async def _of_prompts(client: AsyncClient, question: Question) -> AsyncGenerator[tuple[int, StreamEvent]]:
    streams = [_of_prompt(client, question, at) for at in range(len(question.prompts))]
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    async with aclosing(_merged(streams)) as merged:
        async for item in merged:
            yield item


async def _of_prompt(client: AsyncClient, question: Question, at: int) -> AsyncGenerator[tuple[int, StreamEvent]]:
    prompt, sampling, first = question.prompts[at], question.sampling, at * question.samples
    if question.samples == 1:
        async with client.generate(prompt=prompt, adapter=question.adapter, sampling=sampling) as stream:
            async for event in stream:
                yield first, event
        return
    several = client.sample(None, question.samples, adapter=question.adapter, prompt=prompt, sampling=sampling)
    async with several as samples:
        async for index, event in samples:
            yield first + index, event


async def _merged(
    streams: Sequence[AsyncGenerator[tuple[int, StreamEvent]]],
) -> AsyncGenerator[tuple[int, StreamEvent]]:
    """What several streams yield, as it comes; ends when all have, or with the first failure."""
    pending = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = pending.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(stream))] = stream
                yield item
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
