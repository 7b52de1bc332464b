"""What clients ask while something breaks, and how their answers compare with the ones given while nothing did."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from alora_serve.client import AsyncClient, Finished, PrefixHandle, SamplingParams, Started, TokenChunk


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A conversation, an adapter (empty: the base model), and how it chooses tokens; with a seed where it draws."""

    handle: PrefixHandle
    adapter: str
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Read:
    """A stream as its client read it. ``starts``: how often it was told that the stream starts."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    starts: int

    def is_same_as(self, other: Read) -> bool:
        """Token for token and letter for letter, told once."""
        return (self.tokens, self.text) == (other.tokens, other.text) and self.starts == 1


async def read(
    client: AsyncClient,
    question: Question,
    *,
    after_tokens: int = 5,
    then: Callable[[], Awaitable[None]] | None = None,
    timeout_seconds: float | None = None,
) -> Read:
    """Read a stream to its end. Once ``after_tokens`` have come, ``then`` is called and awaited."""
    tokens: list[int] = []
    logprobs: list[float] = []
    text, starts = "", 0
    stream = client.generate(
        handle=question.handle,
        adapter=question.adapter,
        sampling=question.sampling,
        timeout_seconds=timeout_seconds,
    )
    async for event in stream:
        match event:
            case Started():
                starts += 1
            case TokenChunk():
                tokens += event.token_ids
                logprobs += event.logprobs
                text += event.text
                if then is not None and len(tokens) >= after_tokens:
                    await then()
                    then = None
            case Finished():
                text += event.text
    return Read(tuple(tokens), text, tuple(logprobs), starts)
