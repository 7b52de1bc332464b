"""What a decode worker does with a request: check, place the invocation, load what it lacks, run, report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from time import monotonic

from alora_serve.adapters.activation import Activation
from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.adapters.residency import Lease
from alora_serve.engine.answer import Answer, Ending
from alora_serve.engine.answers import AnswerMaker
from alora_serve.engine.awaited import Awaited
from alora_serve.engine.block_writer import give_up
from alora_serve.engine.bridge import run_sequence
from alora_serve.engine.core import ServingCore
from alora_serve.engine.engine import HEARTBEAT_SECONDS
from alora_serve.engine.events import BaseComputed, SequenceDone
from alora_serve.engine.phases import decode_timings, trace_sequence, trace_store_put
from alora_serve.engine.plan import PromptPlan, plan_prompt
from alora_serve.engine.prefix_loader import LoadedPrefix
from alora_serve.engine.sequence_request import SequenceRequest
from alora_serve.engine.turns import Turns
from alora_serve.errors import AdapterRefusedError, ContextExceededError, FieldViolation, InvalidRequestError
from alora_serve.handles import HandleSigner, check_begun, check_model
from alora_serve.kv.keys import BlockChain
from alora_serve.kv.transfer import StoreResult
from alora_serve.model.kv_memory import Prefix
from alora_serve.telemetry import past_span
from alora_serve.types import (
    AdapterDigest,
    Finished,
    GenerateRequest,
    Heartbeat,
    PrefixHandle,
    PromptKind,
    SamplingParams,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    TokenIds,
    Usage,
)


class Decoder:
    """Generates on one base model with the adapters of one registry. Keeps no session; one event loop."""

    def __init__(self, core: ServingCore, adapters: AdapterRegistry, signer: HandleSigner) -> None:
        self._core = core
        self._adapters = adapters
        self._signer = signer
        self._turns = Turns()
        self._answers = AnswerMaker(core.model)
        self._model_digest = core.model.model_digest

    def warm(self) -> None:
        """Do now, in a second or so, what the first answers of their kind would have to wait for."""
        self._answers.warm()

    async def decode(self, request: GenerateRequest) -> AsyncGenerator[StreamEvent, None]:
        """Run one request: ``Started``, then tokens, then ``Finished``. Close the iterator to cancel.

        While it waits for something, there is a ``Heartbeat`` a second; while it waits for the engine, from the engine.

        Raises:
            HandleInvalidError, HandleExpiredError, ModelMismatchError: the handle is not for this worker.
            AdapterNotFoundError, AdapterRefusedError: the adapter cannot be used.
            ContextExceededError: the prompt leaves no room for an answer, or not for ``max_tokens``.
            InvalidRequestError: a token id exceeds the vocabulary, or the form of the answer what can be held to.
            InvocationUnplaceableError: the adapter's invocation has no place in the prompt.
            OverloadedError: the queue is full.
        """
        started = monotonic()
        salt = self._core.tenants.of(request.tenant)
        # Of what the router takes over, a worker has verified it: an answer outlives the handle that it began from.
        self._signer.verify(request.handle, tenant_salt=salt, field="handle", may_have_expired=request.is_taken_over)
        check_model(request.handle, self._model_digest)
        if request.resume is not None and request.resume.model_digest:
            check_begun(request.resume.model_digest, self._model_digest)
        with ExitStack() as held:
            is_begun, is_taken_over = request.resume is not None, request.is_taken_over
            held.enter_context(self._core.engine.place(request.tenant, is_begun=is_begun, is_taken_over=is_taken_over))
            adapter = None
            if request.adapter:
                acquiring = held.enter_context(self._acquiring(request))
                while not await acquiring.done_within(HEARTBEAT_SECONDS):
                    yield Heartbeat()
                adapter = held.enter_context(acquiring.take()).adapter
                past_span("acquire adapter", started, monotonic())
            adapter_load_seconds = monotonic() - started
            plan = self._plan(request, adapter)
            sampling = self._fitted(request.sampling, plan)
            generated = request.resume.generated_tokens if request.resume else ()
            if self._answers.takes_time(sampling):
                making = held.enter_context(self._making(sampling, generated, salt))
                while not await making.done_within(HEARTBEAT_SECONDS):
                    yield Heartbeat()
                answer, ending = making.take()
            else:
                answer, ending = self._answers.make(sampling, generated, salt)
            yield Started(
                adapter_digest=adapter.digest if adapter else AdapterDigest(""),
                invocation_start=plan.activation.invocation_start,
                seed=request.sampling.seed or 0,
                prompt_tokens=len(plan.prompt),
                model_digest=self._model_digest,
            )
            if ending is not None:
                # The attempt before this one had said everything but that it was done.
                done = SequenceDone(ending, answer.text.finish(), generated)
                yield self._finished(request, plan, done, Usage(), Timings(total_seconds=monotonic() - started))
                return
            chain = self._core.names.chain(plan.prompt if adapter is None else request.handle.prefix_tokens, salt)
            # The last prompt token is always run: its logits choose the first generated token.
            limit = min(plan.base_tokens, len(plan.prompt) - 1, len(chain))
            loaded = LoadedPrefix(Prefix())
            if limit:
                loading = held.enter_context(self._loading(chain, limit))
                while not await loading.done_within(HEARTBEAT_SECONDS):
                    yield Heartbeat()
                loaded = loading.take()
            sequence = SequenceRequest(
                prompt=plan.prompt,
                prefix=loaded.prefix,
                chain=chain,
                base_until=plan.base_tokens if adapter else None,
                adapter=adapter,
                sampling=sampling,
                generated=generated,
                answer=answer,
                tenant=request.tenant,
                is_taken_over=request.is_taken_over,
            )
            writes: list[asyncio.Future[StoreResult]] = []
            held.callback(give_up, writes)
            submitted = monotonic()
            async with run_sequence(self._core.engine, sequence) as running:
                async for event in running:
                    match event:
                        case TokenChunk() | Heartbeat():
                            yield event
                        case BaseComputed(computed, prefix, start, _):
                            self._core.resident.note(computed)
                            write = self._core.writer.start(
                                computed,
                                prefix,
                                start,
                                asked=loaded.asked,
                                within_quota=not request.skip_store,
                                awaited=adapter is None,
                            )
                            writes.append(write)
                        case SequenceDone():
                            stats = event.stats
                            self._core.rates.sequence_seconds.observe(stats.prefill_seconds + stats.decode_seconds)
                            trace_sequence(submitted, stats)
                            putting = monotonic()
                            # A base turn is stored before its stream ends, so that the next turn's prefill finds it.
                            while (
                                adapter is None
                                and writes
                                and (await asyncio.wait(writes, timeout=HEARTBEAT_SECONDS))[1]
                            ):
                                yield Heartbeat()
                            stored = self._core.writer.so_far(writes)
                            if adapter is None and writes:
                                trace_store_put(putting, stored)
                            timings = decode_timings(stats, loaded, adapter_load_seconds, monotonic() - started)
                            usage = _prompt_usage(plan, loaded, stored)
                            yield self._finished(request, plan, event, usage, timings)

    def _acquiring(self, request: GenerateRequest) -> Awaited[Lease]:
        digest = request.resume.adapter_digest if request.resume else None
        return Awaited(asyncio.to_thread(self._adapters.acquire, request.adapter, digest=digest), Lease.release)

    def _making(
        self, sampling: SamplingParams, generated: TokenIds, salt: bytes
    ) -> Awaited[tuple[Answer, Ending | None]]:
        work = partial(self._answers.make, sampling, generated, salt)
        # Forms may take long. They hold up none of another tenant's, and nobody's adapters, which are read elsewhere.
        making = self._turns.run(salt, work) if sampling.structured_output else asyncio.to_thread(work)
        return Awaited(making, lambda unused: None, cancels=True)

    def _loading(self, chain: BlockChain, limit: int) -> Awaited[LoadedPrefix]:
        load = self._core.load_prefix(chain, limit)
        return Awaited(load, lambda unused: self._core.cache.release(unused.prefix), cancels=True)

    def _plan(self, request: GenerateRequest, adapter: LoadedAdapter | None) -> PromptPlan:
        plan = plan_prompt(request.handle, adapter, request.adapter, self._core.model.vocabulary_size)
        self._check(request, plan.activation)
        return plan

    def _fitted(self, sampling: SamplingParams, plan: PromptPlan) -> SamplingParams:
        """With a length that fits. It follows from prompt and context, so that a stream ends alike where it goes on."""
        context, given, prompt = self._core.model.context_tokens, sampling.max_tokens, f"{len(plan.prompt)} tokens"
        room = context - len(plan.prompt)
        if room < 1:
            raise ContextExceededError.beyond(
                "prompt", f"its {prompt} leave no room for an answer: shorten it", context
            )
        if given is not None and given > room:
            excess = f"the prompt has {prompt}, and max_tokens {given} comes to them"
            raise ContextExceededError.beyond("sampling.max_tokens", excess, context)
        return replace(sampling, max_tokens=min(sampling.most_tokens, room))

    def _check(self, request: GenerateRequest, activation: Activation) -> None:
        vocabulary = self._core.model.vocabulary_size
        bad = [
            FieldViolation(f"sampling.{field}", f"token id {token} is outside the vocabulary of {vocabulary}")
            for field, tokens in (
                ("logit_bias", request.sampling.logit_bias),
                ("stop_token_ids", request.sampling.stop_token_ids),
            )
            for token in tokens
            if token >= vocabulary
        ]
        if request.resume is not None and max(request.resume.generated_tokens, default=0) >= vocabulary:
            text = f"a token id is outside the vocabulary of {vocabulary}"
            bad.append(FieldViolation("resume.generated_token_ids", text))
        if bad:
            raise InvalidRequestError(bad[0].description, violations=bad)
        resume = request.resume
        if resume is not None and resume.invocation_start != activation.invocation_start:
            raise AdapterRefusedError(
                f"the interrupted stream turned adapter {request.adapter!r} on at {resume.invocation_start}, "
                f"this worker would at {activation.invocation_start}; start anew"
            )

    def _finished(
        self, request: GenerateRequest, plan: PromptPlan, done: SequenceDone, usage: Usage, timings: Timings
    ) -> Finished:
        if done.ending is None:
            raise RuntimeError("a generation ended without a reason")
        return Finished(
            finish_reason=done.ending.reason,
            usage=replace(
                usage,
                prompt_tokens=len(plan.prompt),
                generated_tokens=len(done.generated),
                invocation_start=plan.activation.invocation_start,
            ),
            timings=timings,
            text=done.text,
            stop_string=done.ending.stop_string,
            handle=None if request.adapter else self._turn_handle(request, plan.prompt + done.generated),
        )

    def _turn_handle(self, request: GenerateRequest, tokens: TokenIds) -> PrefixHandle:
        """Names a base turn's prompt and answer, token for token; in a conversation the turn is still open."""
        in_turn = request.handle.kind is PromptKind.CONVERSATION
        return self._signer.sign(
            PrefixHandle(
                model_digest=self._model_digest,
                storage_digest=self._core.storage_digest,
                prefix_tokens=tokens,
                generation_prompt_tokens=(),
                kind=request.handle.kind,
                last_role="assistant" if in_turn else "",
                open_turn=in_turn,
                expires_unix_seconds=0,  # the signer sets it
            ),
            tenant_salt=self._core.tenants.of(request.tenant),
        )


def _prompt_usage(plan: PromptPlan, loaded: LoadedPrefix, stored: StoreResult) -> Usage:
    """Where the prompt's tokens came from, and what was stored of them."""
    return Usage(
        cached_tokens=loaded.prefix.tokens,
        fetched_tokens=loaded.fetched_tokens,
        computed_tokens=len(plan.prompt) - loaded.prefix.tokens,
        fetched_bytes=loaded.fetched_bytes,
        stored_bytes=stored.stored_bytes,
        store_misses=loaded.misses,
        store_drops=stored.drops,
    )
