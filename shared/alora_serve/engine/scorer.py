"""What a decode worker does with texts to score: tokenize, load the prompt's KV once, run each after it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Final

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.adapters.residency import Lease
from alora_serve.engine.awaited import Awaited
from alora_serve.engine.bridge import run_sequence
from alora_serve.engine.core import ServingCore
from alora_serve.engine.events import BaseComputed, SequenceDone, SequenceStats, TokensScored
from alora_serve.engine.plan import PromptPlan, plan_prompt
from alora_serve.engine.prefix_loader import LoadedPrefix
from alora_serve.engine.scoring import ScoringRequest
from alora_serve.errors import ContextExceededError, FieldViolation, InvalidRequestError
from alora_serve.handles import HandleSigner, check_model
from alora_serve.kv.keys import BlockChain
from alora_serve.kv.transfer import StoreResult
from alora_serve.model.kv_memory import Prefix
from alora_serve.types import ContinuationScore, ScoreRequest, ScoreResult, Timings, TokenIds, Usage

AT_ONCE: Final = 8
"""Continuations of one request in the batch together: as many as share its reads well, and leave room for others."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """One continuation and what it cost."""

    score: ContinuationScore
    loaded: LoadedPrefix
    stats: SequenceStats
    writes: Sequence[asyncio.Future[StoreResult]]


@dataclass(frozen=True, slots=True)
class _Job:
    """What the continuations of a request have in common."""

    request: ScoreRequest
    plan: PromptPlan
    adapter: LoadedAdapter | None
    chain: BlockChain

    @property
    def base_until(self) -> int:
        """The prompt's last token always runs: its row predicts the first of a continuation."""
        return min(self.plan.base_tokens, len(self.plan.prompt) - 1)


class Scorer:
    """Scores on one base model with the adapters of one registry. Keeps no session; one event loop."""

    def __init__(self, core: ServingCore, adapters: AdapterRegistry, signer: HandleSigner) -> None:
        self._core = core
        self._adapters = adapters
        self._signer = signer

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """How likely each continuation is after the prompt, token by token.

        Raises:
            HandleInvalidError, HandleExpiredError, ModelMismatchError: the handle is not for this worker.
            AdapterNotFoundError, AdapterRefusedError: the adapter cannot be used.
            InvalidRequestError: a continuation has no tokens; names all.
            ContextExceededError: one exceeds the context with the prompt.
            InvocationUnplaceableError: the adapter's invocation has no place in the prompt.
            OverloadedError: the queue is full.
        """
        started = monotonic()
        core, handle = self._core, request.handle
        salt = core.tenants.of(request.tenant)
        self._signer.verify(handle, tenant_salt=salt, field="handle")
        check_model(handle, core.model.model_digest)
        with ExitStack() as held:
            held.enter_context(core.engine.place(request.tenant))
            adapter = None
            if request.adapter:
                acquiring = Awaited(asyncio.to_thread(self._adapters.acquire, request.adapter), Lease.release)
                adapter = held.enter_context(await held.enter_context(acquiring).result()).adapter
            plan = plan_prompt(handle, adapter, request.adapter, core.model.vocabulary_size)
            tokenize = partial(self._tokens, request.continuations, len(plan.prompt))
            continuations = await core.turns.run(salt, tokenize)
            chain = core.names.chain(plan.prompt if adapter is None else handle.prefix_tokens, salt)
            job = _Job(request, plan, adapter, chain)
            scored = await self._together(job, continuations)
        stored = core.writer.so_far(write for one in scored for write in one.writes)
        loaded = max((one.loaded for one in scored), key=lambda one: one.fetched_tokens)
        return ScoreResult(
            scores=tuple(one.score for one in scored),
            usage=Usage(
                prompt_tokens=len(plan.prompt),
                cached_tokens=loaded.prefix.tokens,
                fetched_tokens=loaded.fetched_tokens,
                computed_tokens=len(plan.prompt) - loaded.prefix.tokens,
                fetched_bytes=loaded.fetched_bytes,
                invocation_start=plan.activation.invocation_start,
                stored_bytes=stored.stored_bytes,
                store_misses=loaded.misses,
                store_drops=stored.drops,
            ),
            timings=Timings(
                queue_seconds=max(one.stats.queue_seconds for one in scored),
                fetch_seconds=loaded.seconds,
                prefill_seconds=max(one.stats.prefill_seconds for one in scored),
                total_seconds=monotonic() - started,
            ),
        )

    def _tokens(self, continuations: Sequence[str], prompt_tokens: int) -> list[TokenIds]:
        tokenizer, limit = self._core.model.tokenizer, self._core.model.context_tokens
        tokenized, bad = list[TokenIds](), list[FieldViolation]()
        kind: type[InvalidRequestError] = ContextExceededError
        for index, text in enumerate(continuations):
            least = tokenizer.least_tokens(text)
            tokens = tokenizer.encode_text(text) if prompt_tokens + least <= limit else ()
            tokenized.append(tokens)
            count = max(least, len(tokens))
            if not count:
                bad.append(FieldViolation(f"continuations[{index}]", "has no tokens"))
                kind = InvalidRequestError
            if prompt_tokens + count > limit:
                problem = f"prompt of {prompt_tokens} tokens plus {count} exceeds the context of {limit}"
                bad.append(FieldViolation(f"continuations[{index}]", problem))
        if bad:
            raise kind(f"{bad[0].field}: {bad[0].description}", violations=bad)
        return tokenized

    async def _together(self, job: _Job, continuations: Sequence[TokenIds]) -> list[_Scored]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def in_turn(tokens: TokenIds) -> _Scored:
            async with gate:
                return await self._one(job, tokens)

        tasks = [asyncio.ensure_future(in_turn(tokens)) for tokens in continuations]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one that failed ends the request, and with it the others
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, job: _Job, tokens: TokenIds) -> _Scored:
        core, limit = self._core, min(job.base_until, len(job.chain))
        loaded = LoadedPrefix(Prefix())
        if limit:
            load = core.load_prefix(job.chain, limit)
            with Awaited(load, lambda unused: core.cache.release(unused.prefix), cancels=True) as loading:
                loaded = await loading.result()
        sequence = ScoringRequest(
            prompt=job.plan.prompt + tokens[:-1],
            prefix=loaded.prefix,
            chain=job.chain,
            base_until=job.base_until,
            adapter=job.adapter,
            tenant=job.request.tenant,
            given=tokens,
        )
        logprobs: list[float] = []
        writes: list[asyncio.Future[StoreResult]] = []
        stats = None
        async with run_sequence(core.engine, sequence) as running:
            async for event in running:
                match event:
                    case TokensScored():
                        logprobs += event.logprobs
                    case BaseComputed(computed, prefix, start, _):
                        core.resident.note(computed)
                        within_quota = not job.request.skip_store
                        writes.append(
                            core.writer.start(
                                computed, prefix, start, asked=loaded.asked, within_quota=within_quota, awaited=False
                            )
                        )
                    case SequenceDone():
                        stats = event.stats
        if stats is None or len(logprobs) != len(tokens):
            raise RuntimeError("a scored sequence ended without its scores")
        return _Scored(ContinuationScore(tokens, tuple(logprobs)), loaded, stats, writes)
