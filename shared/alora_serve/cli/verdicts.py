"""Intrinsics asked about a conversation, and what they find."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from alora_serve.client import Client, Prompt
from alora_serve.client.results import Transcript
from alora_serve.errors import AloraServeError, InvalidRequestError
from alora_serve.types import AdapterInfo, Finished, Timings, Usage

PLAIN_TOKENS: Final = 64
"""Most tokens of an answer whose adapter has no ``io.yaml`` to say so."""
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
        cost: None exactly when it failed.
        error: why it has no result.
    """

    name: str
    value: Any = None
    text: str = ""
    cost: Cost | None = None
    error: AloraServeError | None = None

    @property
    def shown(self) -> str:
        """The result as people read it: numbers with at most three digits after the point."""
        return self.value if isinstance(self.value, str) else json.dumps(_rounded(self.value), ensure_ascii=False)

    @property
    def likelihood(self) -> float | None:
        """The one number of the result, or 1 and 0 for an answer of yes and no; None if it is neither."""
        if isinstance(self.value, str):
            return _YES_OR_NO.get(self.value)
        fields = self.value.values() if isinstance(self.value, dict) else ()
        numbers = [float(field) for field in fields if type(field) in (int, float)]
        return numbers[0] if len(numbers) == 1 else None


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, 3)
        case dict():
            return {name: _rounded(part) for name, part in value.items()}
        case list():
            return [_rounded(part) for part in value]
    return value


def parse_parameters(given: Sequence[str]) -> Mapping[str, str]:
    """What instructions name, of texts ``NAME=VALUE``.

    Raises:
        InvalidRequestError: one is written otherwise.
    """
    for text in given:
        if "=" not in text:
            raise InvalidRequestError.of("parameter", f"{text!r} is not NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


def untyped(adapters: Iterable[AdapterInfo]) -> frozenset[str]:
    """Names of those that no ``io.yaml`` defines as intrinsics."""
    return frozenset(adapter.name for adapter in adapters if not adapter.intrinsic_digest)


def run_intrinsics(
    client: Client,
    prompt: Prompt,
    names: Sequence[str],
    *,
    timeout_seconds: float,
    plain: Container[str] = (),
    whole: Prompt | None = None,
) -> Iterator[Verdict]:
    """Ask adapters about one conversation, together; a verdict comes as soon as its adapter has answered.

    Args:
        client: of the router.
        prompt: the conversation.
        names: of the adapters.
        timeout_seconds: of each call.
        plain: those of them that are asked without an ``io.yaml``: their text is their result.
        whole: the same conversation as messages, for intrinsics that must see what a handle hides.

    Raises:
        AloraServeError: a call as a whole failed.
    """
    typed = [name for name in names if name not in plain]
    again: list[str] = []
    for verdict in _run_typed(client, prompt, typed, timeout_seconds):
        # The error of one intrinsic of several names no field; that it reads turns which the handle hides is likely.
        if whole is not None and prompt.handle is not None and isinstance(verdict.error, InvalidRequestError):
            again.append(verdict.name)
        else:
            yield verdict
    if whole is not None:
        yield from _run_typed(client, whole, again, timeout_seconds)
    yield from _run_plain(client, prompt, [name for name in names if name in plain], timeout_seconds)


def _run_typed(client: Client, prompt: Prompt, names: Sequence[str], timeout_seconds: float) -> Iterator[Verdict]:
    if not names:
        return
    with client.run_intrinsics(None, names, prompt=prompt, timeout_seconds=timeout_seconds) as stream:
        for index, outcome in stream:
            name = names[index]
            if isinstance(outcome, AloraServeError):
                yield Verdict(name, error=outcome)
            else:
                cost = Cost(name, outcome.usage, outcome.timings)
                yield Verdict(name, outcome.result, outcome.raw_text, cost)


def _run_plain(client: Client, prompt: Prompt, names: Sequence[str], timeout_seconds: float) -> Iterator[Verdict]:
    if not names:
        return
    transcripts = [Transcript() for _ in names]
    with client.fanout(None, names, prompt=prompt, max_tokens=PLAIN_TOKENS, timeout_seconds=timeout_seconds) as stream:
        for index, event in stream:
            name = names[index]
            if isinstance(event, AloraServeError):
                yield Verdict(name, error=event)
                continue
            transcripts[index].add(event)
            if isinstance(event, Finished):
                result = transcripts[index].result()
                yield Verdict(name, result.text.strip(), result.text, Cost(name, result.usage, result.timings))
