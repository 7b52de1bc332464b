"""The calls that a chat makes of the router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alora_serve.cli.verdicts import Verdict, run_intrinsics, untyped
from alora_serve.client import Client, GenerationStream, Prompt, SamplingParams
from alora_serve.types import AdapterInfo, Finished, ModelInfo, TokenChunk


class Calls:
    """A router, and how it is asked."""

    def __init__(self, client: Client, sampling: SamplingParams, timeout_seconds: float) -> None:
        """Prepare.

        Args:
            client: of the router.
            sampling: of the base model. Adapters answer greedily, in as many tokens.
            timeout_seconds: of each call.
        """
        self._client = client
        self._sampling = sampling
        self._timeout_seconds = timeout_seconds
        self._untyped: frozenset[str] = frozenset()

    def model(self) -> ModelInfo:
        """The base model."""
        return self._client.get_model(timeout_seconds=self._timeout_seconds)

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Every adapter that is served, or says why not; :meth:`judge` goes by what was listed last."""
        listed = tuple(self._client.list_adapters(timeout_seconds=self._timeout_seconds))
        self._untyped = untyped(listed)
        return listed

    def answer(self, prompt: Prompt, adapter: str) -> GenerationStream:
        """The base model's answer, or an adapter's, as it comes."""
        sampling = self._sampling
        if adapter:
            longest, default = sampling.max_tokens, sampling.default_max_tokens
            sampling = SamplingParams(max_tokens=longest, default_max_tokens=default)
        return self._client.generate(
            prompt=prompt, adapter=adapter, sampling=sampling, timeout_seconds=self._timeout_seconds
        )

    def judge(self, prompt: Prompt, whole: Prompt, names: Sequence[str]) -> Iterator[Verdict]:
        """A verdict for each name, as it comes; ``whole`` is the prompt's conversation as messages.

        Raises:
            AloraServeError: a call as a whole failed.
        """
        return run_intrinsics(
            self._client,
            prompt,
            names,
            timeout_seconds=self._timeout_seconds,
            plain=self._untyped,
            whole=whole,
        )


def text_of(event: object) -> str:
    """What an event of a stream adds to the answer's text."""
    return event.text if isinstance(event, TokenChunk | Finished) else ""
