"""Runs intrinsics: asks their adapters what their definitions say, on one prefill, and reads the answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from adapter_router.adapters import AdapterDirectory
from adapter_router.definitions import Definitions
from adapter_router.demands import Demands, is_plain_lora
from adapter_router.dispatch import Call
from adapter_router.merge import merge_streams
from adapter_router.policy import Demand
from adapter_router.prepare import Prepared, Preparer
from adapter_router.stream import DecodeStream
from alora_serve.client.results import GenerationResult, Transcript
from alora_serve.errors import AdapterRefusedError, AloraServeError, IntrinsicOutputError, InvalidRequestError
from alora_serve.intrinsics import Answer, IntrinsicDefinition, Question, ScoredToken, ask, conclude
from alora_serve.rpc.convert import Target, event_from_proto, prompt_to_proto
from alora_serve.rpc.convert.names import path_to
from alora_serve.types import (
    AdapterInfo,
    FinishReason,
    IntrinsicResult,
    IntrinsicRun,
    JsonSchema,
    PrefillResult,
    SamplingParams,
)

T = TypeVar("T")

TOP_LOGPROBS: Final = 20
"""Alternatives that a likelihood weighs: as many as a worker tells."""

OpenStream = Callable[[Prepared, Target, Demand, Call, PrefillResult | None], DecodeStream]
"""Begins a generation, whose usage tells the prefill's too if one is given."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One intrinsic of a run. ``index`` is its place there."""

    index: int
    adapter: AdapterInfo
    definition: IntrinsicDefinition
    question: Question

    @property
    def shares(self) -> bool:
        """It can use base KV."""
        return not is_plain_lora(self.adapter)


class Intrinsics:
    """Runs intrinsics on conversations."""

    def __init__(
        self,
        adapters: AdapterDirectory,
        definitions: Definitions,
        preparer: Preparer,
        demands: Demands,
        *,
        open_stream: OpenStream,
        takes_documents: Callable[[], bool],
    ) -> None:
        """Keep who does what.

        Args:
            adapters: finds adapters by name.
            definitions: says what to ask them.
            preparer: prepares conversations.
            demands: says what generations need of workers.
            open_stream: see :data:`OpenStream`.
            takes_documents: whether the chat template of the model served has a place for documents.
        """
        self._adapters = adapters
        self._definitions = definitions
        self._preparer = preparer
        self._demands = demands
        self._open_stream = open_stream
        self._takes_documents = takes_documents

    async def run_one(self, run: IntrinsicRun, call: Call) -> IntrinsicResult:
        """The result of a run of one intrinsic.

        Raises:
            AloraServeError: why there is none.
        """
        async with aclosing(self.run(run, call)) as results:
            _, result = await anext(results)
        if isinstance(result, AloraServeError):
            raise result
        return result

    async def run(
        self, run: IntrinsicRun, call: Call
    ) -> AsyncGenerator[tuple[int, IntrinsicResult | AloraServeError], None]:
        """Results as they come, each with its intrinsic's index, or the error that it failed with.

        Intrinsics whose definitions leave the same conversation before their instructions share its prefill.

        Raises:
            AloraServeError: what all intrinsics share has failed.
        """
        asked: list[Asked] = []
        for index, outcome in enumerate(await self._ask(run, call)):
            if isinstance(outcome, Asked):
                asked.append(outcome)
            elif outcome is not None:
                yield index, outcome
        groups = _grouped(asked)
        streams = [self._results(group, call, is_all=len(groups) == 1) for group in groups]
        async with aclosing(merge_streams(streams)) as merged:
            async for _, item in merged:
                if isinstance(item, AloraServeError):
                    raise item
                yield item

    async def _ask(self, run: IntrinsicRun, call: Call) -> list[Asked | AloraServeError | None]:
        """What each intrinsic asks, or why it cannot; None for those that are done.

        Raises:
            InvalidRequestError: a parameter that none of them names.
        """
        found = await _outcomes(self._find(name, call) for name in run.names)
        known = [item for item in found if not isinstance(item, AloraServeError)]
        unknown = run.parameters.keys() - {name for _, definition in known for name in definition.parameters}
        if unknown and len(known) == len(found):
            field = path_to("parameters", min(unknown))
            raise InvalidRequestError.of(field, "no intrinsic of this request names it; omit it")
        takes_documents = self._takes_documents()

        async def asked(index: int, adapter: AdapterInfo, definition: IntrinsicDefinition) -> Asked:
            question = await asyncio.to_thread(  # splitting long documents takes a while
                ask, definition, run.prompt, run.parameters, template_takes_documents=takes_documents
            )
            return Asked(index, adapter, definition, question)

        outcomes: list[Asked | AloraServeError | None] = []
        for index, item in enumerate(found):
            if index in run.done:
                outcomes.append(None)
            else:
                outcomes.append(item if isinstance(item, AloraServeError) else await _outcome(asked(index, *item)))
        return outcomes

    async def _find(self, name: str, call: Call) -> tuple[AdapterInfo, IntrinsicDefinition]:
        adapter = self._adapters.get(name)
        return adapter, await self._definitions.of(adapter, call)

    async def _results(
        self, group: Sequence[Asked], call: Call, *, is_all: bool
    ) -> AsyncGenerator[tuple[int, IntrinsicResult | AloraServeError], None]:
        """Results of intrinsics that share a conversation. Raises what they share where they are all of the run."""
        shared = await _outcome(self._share(group, call))
        if isinstance(shared, AloraServeError):
            if is_all:
                raise shared
            for asked in group:
                yield asked.index, shared
            return
        demands = self._demands.fan_out(shared.handle, [asked.adapter for asked in group], call.tenant_salt)
        told = next((asked for asked in group if asked.shares), group[0])
        streams = [
            self._result(asked, shared, demand, call, alone=len(group) == 1, tells_prefill=asked is told)
            for asked, demand in zip(group, demands, strict=True)
        ]
        async with aclosing(merge_streams(streams)) as merged:
            async for place, result in merged:
                yield group[place].index, result

    async def _share(self, group: Sequence[Asked], call: Call) -> Prepared:
        """The prefill of a group: of what its members share or, of a single one, of all that it asks."""
        question = group[0].question
        prompt = question.prompt if len(group) == 1 else question.conversation
        return await self._preparer.prepare(
            prompt,
            prompt_to_proto(prompt),
            call=call,
            adapters=[asked.adapter.name for asked in group],
            tokenize_only=not any(asked.shares for asked in group),
        )

    async def _result(
        self, asked: Asked, shared: Prepared, demand: Demand, call: Call, *, alone: bool, tells_prefill: bool
    ) -> AsyncGenerator[IntrinsicResult, None]:
        """The one result of an intrinsic, on what it shares."""
        prepared = shared
        if not alone and asked.question.instruction is not None:
            # Only rendered: its worker computes what follows the conversation, on the KV that all of them read.
            prompt, model = asked.question.prompt, shared.handle.model_digest
            prepared = await self._preparer.prepare(
                prompt, prompt_to_proto(prompt), call=call, tokenize_only=True, begun_with=model
            )
        target = Target(asked.adapter.name, _sampling(asked.definition))
        transcript = Transcript()
        stream = self._open_stream(prepared, target, demand, call, shared.prefill if tells_prefill else None)
        try:
            async with aclosing(stream.events()) as events:
                async for event in events:
                    transcript.add(event_from_proto(event))
        except InvalidRequestError as error:
            # Its caller said nothing of sampling.
            if any(violation.field.startswith("sampling.") for violation in error.violations):
                raise AdapterRefusedError(
                    f"adapter {asked.adapter.name!r} cannot be asked: response_format or parameters of its io.yaml:"
                    f" {error}"
                ) from error
            raise
        yield _concluded(asked, transcript.result())


def _grouped(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Those that share a conversation together."""
    groups: list[list[Asked]] = []
    for one in asked:
        group = next((g for g in groups if g[0].question.conversation == one.question.conversation), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return groups


def _sampling(definition: IntrinsicDefinition) -> SamplingParams:
    return replace(
        definition.sampling,
        structured_output=JsonSchema(definition.json_schema) if definition.json_schema else None,
        logprobs=definition.needs_logprobs,
        top_logprobs=TOP_LOGPROBS if definition.needs_logprobs else 0,
    )


def _concluded(asked: Asked, generation: GenerationResult) -> IntrinsicResult:
    """What the answer comes to.

    Raises:
        IntrinsicOutputError: it was cut off, or does not fit the definition.
    """
    if generation.finish_reason is FinishReason.LENGTH:
        raise IntrinsicOutputError(
            f"intrinsic {asked.adapter.name!r}: the answer was cut off after {len(generation.token_ids)} tokens; raise "
            f"parameters.max_completion_tokens in its io.yaml",
            metadata={"adapter": asked.adapter.name},
        )
    tokens = tuple(
        ScoredToken(content, logprob, tuple((other.token_bytes, other.logprob) for other in others))
        for content, logprob, others in zip(
            generation.token_bytes, generation.logprobs, generation.top_logprobs, strict=True
        )
    )
    try:
        outcome = conclude(asked.definition, Answer(generation.text, tokens, asked.question.sentences))
    except IntrinsicOutputError as error:
        name = asked.adapter.name
        raise IntrinsicOutputError(f"intrinsic {name!r}: {error}", metadata={"adapter": name}) from error
    return IntrinsicResult(outcome.result, generation.text, generation.usage, generation.timings, outcome.probabilities)


async def _outcome(work: Awaitable[T]) -> T | AloraServeError:
    """What the work comes to, or the error of ours that it fails with."""
    try:
        return await work
    except AloraServeError as error:
        return error


async def _outcomes(works: Iterable[Awaitable[T]]) -> list[T | AloraServeError]:
    return await asyncio.gather(*map(_outcome, works))
