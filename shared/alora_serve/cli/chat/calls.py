"""The calls that a chat makes of the router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from alora_serve.cli.chat.events import Cost, Verdict
from alora_serve.client import Client, GenerationResult, GenerationStream, Prompt, SamplingParams
from alora_serve.client.results import Transcript
from alora_serve.errors import AloraServeError
from alora_serve.types import AdapterInfo, Finished, TokenChunk

INTRINSIC_TOKENS: Final = 64
"""Most tokens of an intrinsic's answer."""


@dataclass(frozen=True, slots=True)
class Calls:
    """A router, and how it is asked.

    Attributes:
        sampling: of the base model. Adapters answer greedily, in as many tokens.
        timeout_seconds: of each call.
    """

    client: Client
    sampling: SamplingParams
    timeout_seconds: float

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Every adapter that is served, or says why not."""
        return tuple(self.client.list_adapters(timeout_seconds=self.timeout_seconds))

    def answer(self, prompt: Prompt, adapter: str) -> GenerationStream:
        """The base model's answer, or an adapter's, as it comes."""
        sampling = SamplingParams(max_tokens=self.sampling.max_tokens) if adapter else self.sampling
        return self.client.generate(
            prompt=prompt, adapter=adapter, sampling=sampling, timeout_seconds=self.timeout_seconds
        )

    def judge(self, prompt: Prompt, names: Sequence[str]) -> Iterator[Verdict]:
        """A verdict for each name, as it comes.

        Raises:
            AloraServeError: the call as a whole failed.
        """
        return run_intrinsics(self.client, prompt, names, self.timeout_seconds)


def run_intrinsics(client: Client, prompt: Prompt, names: Sequence[str], timeout_seconds: float) -> Iterator[Verdict]:
    """Ask adapters about one conversation, all at once; a verdict comes as soon as its adapter has answered.

    Raises:
        AloraServeError: the call as a whole failed.
    """
    transcripts = [Transcript() for _ in names]
    sampling = SamplingParams(max_tokens=INTRINSIC_TOKENS)
    with client.fanout(None, names, prompt=prompt, sampling=sampling, timeout_seconds=timeout_seconds) as stream:
        for index, event in stream:
            name = names[index]
            if isinstance(event, AloraServeError):
                yield Verdict(name, error=event)
                continue
            transcripts[index].add(event)
            if isinstance(event, Finished):
                yield _verdict(name, transcripts[index].result())


def text_of(event: object) -> str:
    """What an event of a stream adds to the answer's text."""
    return event.text if isinstance(event, TokenChunk | Finished) else ""


def _verdict(name: str, result: GenerationResult) -> Verdict:
    text = result.text.strip()
    return Verdict(name, text, result.text, Cost(name, result.usage, result.timings))
