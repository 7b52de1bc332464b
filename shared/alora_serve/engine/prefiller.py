"""What the base-prefill service does with a prompt: render, find, load, compute the rest, store, sign."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from time import monotonic

from alora_serve.engine.block_writer import give_up
from alora_serve.engine.bridge import run_sequence
from alora_serve.engine.core import ServingCore
from alora_serve.engine.events import BaseComputed, SequenceDone, SequenceStats
from alora_serve.engine.phases import trace_sequence, trace_store_put
from alora_serve.engine.prefix_loader import LoadedPrefix
from alora_serve.engine.sequence_request import SequenceRequest
from alora_serve.errors import ContextExceededError, FieldViolation, InvalidRequestError
from alora_serve.handles import HandleSigner, check_model
from alora_serve.kv.keys import BlockChain
from alora_serve.kv.transfer import StoreResult
from alora_serve.model.chat import RenderedPrompt
from alora_serve.telemetry import span
from alora_serve.types import PrefillResult, PrefixHandle, Prompt, PromptKind, Timings, TokenIds, Usage


class Prefiller:
    """Prefills prompts on one base model; one event loop."""

    def __init__(self, core: ServingCore, signer: HandleSigner) -> None:
        self._core = core
        self._signer = signer
        self._model_digest = core.model.model_digest

    async def prefill(
        self, prompt: Prompt, *, tokenize_only: bool = False, tenant: str = "", skip_store: bool = False
    ) -> PrefillResult:
        """Make a prompt's KV fetchable and name it. Blocks first, answer last.

        Args:
            tokenize_only: sign the tokens, compute and store nothing.
            tenant: whose conversation it is.
            skip_store: write nothing new to the store.

        Raises:
            InvalidRequestError: bad prompt or handle.
            ContextExceededError: a prompt longer than the context.
            ModelMismatchError: the handle is of another model.
            OverloadedError: the queue is full, or holds as much of the tenant as it may.
        """
        started = monotonic()
        salt = self._core.tenants.of(tenant)
        hold = self._core.tokenizing.hold if tokenize_only else self._core.engine.place
        with hold(tenant):
            with span("render"):
                unsigned = await self._core.turns.run(salt, partial(self._tokens, prompt, salt))
            tokens = unsigned.prefix_tokens
            self._check_length(tokens)
            if tokenize_only:
                usage = Usage(prompt_tokens=len(tokens), computed_tokens=0)
                return PrefillResult(
                    self._signer.sign(unsigned, tenant_salt=salt), usage, Timings(total_seconds=monotonic() - started)
                )
            chain = self._core.names.chain(tokens, salt)
            loaded = await self._core.load_prefix(chain, len(tokens))
            computed, stored, stats = await self._compute_and_store(chain, loaded, tenant, within_quota=not skip_store)
        usage = Usage(
            prompt_tokens=len(tokens),
            cached_tokens=len(tokens) - computed,
            fetched_tokens=loaded.fetched_tokens,
            computed_tokens=computed,
            fetched_bytes=loaded.fetched_bytes,
            stored_bytes=stored.stored_bytes,
            store_misses=loaded.misses,
            store_drops=stored.drops,
        )
        timings = Timings(
            queue_seconds=stats.queue_seconds if stats else 0.0,
            fetch_seconds=loaded.seconds,
            prefill_seconds=stats.prefill_seconds if stats else 0.0,
            total_seconds=monotonic() - started,
        )
        return PrefillResult(self._signer.sign(unsigned, tenant_salt=salt), usage, timings)

    async def _compute_and_store(
        self, chain: BlockChain, loaded: LoadedPrefix, tenant: str, *, within_quota: bool
    ) -> tuple[int, StoreResult, SequenceStats | None]:
        known = loaded.present
        start_writing = partial(self._core.writer.start, asked=loaded.asked, within_quota=within_quota)
        if loaded.prefix.tokens == len(chain):
            putting = monotonic()
            stored = await start_writing(chain, loaded.prefix, len(chain), known=known)
            trace_store_put(putting, stored)
            return 0, stored, None
        request = SequenceRequest(prompt=chain.tokens, prefix=loaded.prefix, chain=chain, tenant=tenant)
        writes: list[asyncio.Future[StoreResult]] = []
        stats, submitted = None, monotonic()
        with ExitStack() as held:
            held.callback(give_up, writes)
            async with run_sequence(self._core.engine, request) as running:
                async for event in running:
                    match event:
                        case BaseComputed(computed_chain, prefix, start, _):
                            self._core.resident.note(computed_chain)
                            # Stored while the next chunk computes. Blocks before the first one may be in memory only.
                            writes.append(start_writing(computed_chain, prefix, start, known=None if writes else known))
                        case SequenceDone():
                            stats = event.stats
                            self._core.rates.sequence_seconds.observe(stats.prefill_seconds + stats.decode_seconds)
                            trace_sequence(submitted, stats)
            if not writes:
                # A neighbour computed all of it, and may not have stored it yet.
                adopted = await self._core.loader.load(chain, len(chain))
                writes.append(start_writing(chain, adopted.prefix, len(chain), known=known))
            putting = monotonic()
            stored = sum(await asyncio.gather(*writes), StoreResult())
            trace_store_put(putting, stored)
            return stats.computed_tokens if stats else 0, stored, stats

    def _check_length(self, tokens: TokenIds) -> None:
        limit = self._core.model.context_tokens
        if len(tokens) >= limit:
            excess = f"its {len(tokens)} tokens leave no room for an answer: shorten it"
            raise ContextExceededError.beyond("prompt", excess, limit)

    def _tokens(self, prompt: Prompt, tenant_salt: bytes) -> PrefixHandle:
        """The prompt as an unsigned handle."""
        if prompt.handle is not None:
            self._signer.verify(prompt.handle, tenant_salt=tenant_salt)
            check_model(prompt.handle, self._model_digest)
        template: Mapping[str, object] = {
            "documents": prompt.documents,
            "tools": prompt.tools,
            "template_arguments": prompt.template_arguments,
        }
        if prompt.token_ids:
            return self._handle("token_ids", RenderedPrompt(prompt.token_ids, (), ""), PromptKind.TOKENS)
        if prompt.text:
            return self._handle("text", self._core.model.tokenizer.raw(prompt.text), PromptKind.TOKENS)
        if prompt.handle is None:
            rendered = self._core.model.tokenizer.render(prompt.messages, **template)  # type: ignore[arg-type]
            return self._handle("messages", rendered, PromptKind.CONVERSATION)
        if not prompt.messages and not prompt.handle.open_turn:
            return replace(prompt.handle, storage_digest=self._core.storage_digest, mac=b"")
        rendered = self._core.model.tokenizer.continue_from(prompt.handle, prompt.messages, **template)  # type: ignore[arg-type]
        return self._handle("messages", rendered, PromptKind.CONVERSATION)

    def _handle(self, field: str, rendered: RenderedPrompt, kind: PromptKind) -> PrefixHandle:
        # Those of text as well: a tokenizer may have added tokens that the model has no embedding of.
        largest = max((*rendered.prefix_tokens, *rendered.generation_prompt_tokens), default=0)
        if largest >= self._core.model.vocabulary_size:
            text = f"token id {largest} is outside the vocabulary of {self._core.model.vocabulary_size}"
            raise InvalidRequestError(text, violations=[FieldViolation(f"prompt.{field}", text)])
        return PrefixHandle(
            model_digest=self._model_digest,
            storage_digest=self._core.storage_digest,
            prefix_tokens=rendered.prefix_tokens,
            generation_prompt_tokens=rendered.generation_prompt_tokens,
            kind=kind,
            last_role=rendered.last_role,
            open_turn=False,
            expires_unix_seconds=0,  # the signer sets it
        )
