"""The calls that a chat makes of the router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alora_serve.cli.verdicts import Verdict, run_intrinsics
from alora_serve.client import Client, GenerationStream, Prompt, SamplingParams
from alora_serve.types import AdapterInfo, Finished, TokenChunk


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


def text_of(event: object) -> str:
    """What an event of a stream adds to the answer's text."""
    return event.text if isinstance(event, TokenChunk | Finished) else ""
