"""What clients ask while something breaks, and how their answers compare with the ones given while nothing did."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from alora_serve.client import AsyncClient, ChatMessage, Finished, PrefixHandle, SamplingParams, Started, TokenChunk


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A conversation, by its handle or its turns; an adapter (empty: the base model); and how it chooses tokens.

    It has a seed where it draws.
    """

    about: PrefixHandle | tuple[ChatMessage, ...]
    adapter: str
    sampling: SamplingParams

    @property
    def prompt(self) -> dict[str, Any]:
        """As clients take it."""
        return {"handle": self.about} if isinstance(self.about, PrefixHandle) else {"messages": self.about}


@dataclass(frozen=True, slots=True)
class Read:
    """A stream as its client read it.

    Attributes:
        starts: how often it was told that the stream starts.
        adapter_digest: with which version of the adapter.
        longest_pause_seconds: before a piece of it.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    starts: int
    adapter_digest: str = ""
    longest_pause_seconds: float = 0.0

    def difference(self, other: Read) -> str:
        """Where it first differs, in words."""
        if self.starts != 1:
            return f"told {self.starts} times that it starts"
        shorter = min(len(self.tokens), len(other.tokens))
        at = next((index for index in range(shorter) if self.tokens[index] != other.tokens[index]), shorter)
        return f"differs from token {at} on: {self.tokens[at : at + 3]} for {other.tokens[at : at + 3]}"

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
    text, starts, digest = "", 0, ""
    last, longest_pause = time.monotonic(), 0.0
    stream = client.generate(
        adapter=question.adapter,
        sampling=question.sampling,
        timeout_seconds=timeout_seconds,
        **question.prompt,
    )
    async for event in stream:
        match event:
            case Started():
                starts += 1
                digest = event.adapter_digest
            case TokenChunk():
                now = time.monotonic()
                last, longest_pause = now, max(longest_pause, now - last)
                tokens += event.token_ids
                logprobs += event.logprobs
                text += event.text
                if then is not None and len(tokens) >= after_tokens:
                    await then()
                    then = None
            case Finished():
                text += event.text
    return Read(tuple(tokens), text, tuple(logprobs), starts, digest, longest_pause)
