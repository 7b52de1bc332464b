"""Puts a test set to a server, several rows at a time, and reads what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from alora_serve.client import Client, JsonSchema, Prompt
from alora_serve.errors import IntrinsicOutputError
from alora_serve.evaluation.items import Form, Item
from alora_serve.intrinsics import Answer, IntrinsicDefinition, ScoredToken, ask, conclude
from alora_serve.training.rows import Row
from alora_serve.types import IntrinsicResult

MAX_LABELS: Final = 20
"""More different targets than this are free text."""
_WEIGHED_TOKENS: Final = 20


class Asker(Protocol):
    """Asks one question about a conversation. Thread-safe."""

    def ask(self, row: Row) -> IntrinsicResult:
        """The answer.

        Raises:
            IntrinsicOutputError: it is not in the form that was asked for.
            AloraServeError: there is none.
        """


@dataclass(frozen=True, slots=True)
class IntrinsicAsker:
    """Asks an intrinsic of the server, by the definition that the server holds.

    Attributes:
        parameters: what its instruction names, the same for every row.
    """

    client: Client
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    def ask(self, row: Row) -> IntrinsicResult:
        """See :class:`Asker`."""
        return self.client.run_intrinsic(row.messages, self.name, parameters=self.parameters, documents=row.documents)


@dataclass(frozen=True, slots=True)
class DefinedAsker:
    """Asks the base model, or an adapter without definition, by one of our own.

    Attributes:
        adapter: empty for the base model.
        template_takes_documents: the model's chat template has a place for documents.
    """

    client: Client
    adapter: str
    definition: IntrinsicDefinition
    template_takes_documents: bool

    def ask(self, row: Row) -> IntrinsicResult:
        """See :class:`Asker`."""
        prompt = Prompt(messages=row.messages, documents=row.documents)
        question = ask(self.definition, prompt, {}, template_takes_documents=self.template_takes_documents)
        sampling = replace(
            self.definition.sampling,
            structured_output=JsonSchema(self.definition.json_schema),
            logprobs=True,
            top_logprobs=_WEIGHED_TOKENS,
        )
        said = self.client.generate(prompt=question.prompt, adapter=self.adapter, sampling=sampling).result()
        tokens = tuple(
            ScoredToken(content, logprob, tuple((other.token_bytes, other.logprob) for other in others))
            for content, logprob, others in zip(said.token_bytes, said.logprobs, said.top_logprobs, strict=True)
        )
        outcome = conclude(self.definition, Answer(said.text, tokens))
        return IntrinsicResult(outcome.result, said.text, said.usage, said.timings, outcome.probabilities)


def labels_of(items: Sequence[Item]) -> tuple[str, ...]:
    """The different targets, or none where answers are texts or targets too many to be labels."""
    targets = sorted({item.target for item in items})
    is_text = any(item.form == "text" for item in items)
    return () if is_text or len(targets) > MAX_LABELS else tuple(targets)


def ask_all(asker: Asker, rows: Sequence[Row], together: int, on_answer: Callable[[Item], None]) -> tuple[Item, ...]:
    """Every row's item, in order. ``on_answer`` is called as they come, from other threads.

    Raises:
        AloraServeError: a row could not be asked. An answer in the wrong form is no such case: it is wrong.
    """

    def asked(row: Row) -> Item:
        item = _item(asker, row)
        on_answer(item)
        return item

    with ThreadPoolExecutor(together) as threads:
        running = [threads.submit(asked, row) for row in rows]
        try:
            return tuple(future.result() for future in running)
        finally:
            threads.shutdown(cancel_futures=True)


def _item(asker: Asker, row: Row) -> Item:
    try:
        said = asker.ask(row)
    except IntrinsicOutputError:
        return Item(row.row_id, row.source, row.target, prediction="", form="none")
    prediction, form = _read(said)
    return Item(
        item_id=row.row_id,
        source=row.source,
        target=row.target,
        prediction=prediction,
        probabilities=dict(next(iter(said.probabilities.values()), {})),
        seconds=said.timings.total_seconds,
        first_token_seconds=said.timings.first_token_seconds,
        prompt_tokens=said.usage.prompt_tokens,
        cached_tokens=said.usage.cached_tokens,
        generated_tokens=said.usage.generated_tokens,
        form=form,
    )


def _read(said: IntrinsicResult) -> tuple[str, Form]:
    """What an answer's JSON says, and whether it is a label: a plain value, or one weighed against others."""
    value: Any = json.loads(said.raw_text)
    is_label = bool(said.probabilities) or not isinstance(value, dict | list)
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    return value if isinstance(value, str) else json.dumps(value), "label" if is_label else "text"
