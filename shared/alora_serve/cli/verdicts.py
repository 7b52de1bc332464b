"""Intrinsics asked about a conversation, and what they find."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from alora_serve.client import Client, GenerationResult, Prompt, SamplingParams
from alora_serve.client.results import Transcript
from alora_serve.errors import AloraServeError
from alora_serve.types import Finished, Timings, Usage

INTRINSIC_TOKENS: Final = 64
"""Most tokens of an intrinsic's answer."""
_YES_OR_NO: Final = {"yes": 1.0, "no": 0.0}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one answer cost. ``who`` is empty for the base model."""

    who: str
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one intrinsic found.

    Attributes:
        name: of the intrinsic.
        value: its result as JSON values; the answer's text where nothing more is known of it.
        text: what its adapter said.
        cost: None when it failed.
        error: why it has no result.
    """

    name: str
    value: Any = None
    text: str = ""
    cost: Cost | None = None
    error: AloraServeError | None = None

    @property
    def shown(self) -> str:
        """The result as people read it."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)

    @property
    def likelihood(self) -> float | None:
        """The one number of the result, or 1 and 0 for an answer of yes and no; None if it is neither."""
        if isinstance(self.value, str):
            return _YES_OR_NO.get(self.value)
        fields = self.value.values() if isinstance(self.value, dict) else ()
        numbers = [float(field) for field in fields if type(field) in (int, float)]
        return numbers[0] if len(numbers) == 1 else None


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


def _verdict(name: str, result: GenerationResult) -> Verdict:
    return Verdict(name, result.text.strip(), result.text, Cost(name, result.usage, result.timings))
