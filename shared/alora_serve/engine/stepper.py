"""One step of a batch: schedule, forward, publish, sample, deliver. Runs on the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from time import monotonic

from torch import Tensor

from alora_serve.engine.batch import Batch, adapter_rows, arrange
from alora_serve.engine.lora_rows import LoraRows
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.sampling import choose_tokens
from alora_serve.engine.scheduler import followers, share_step
from alora_serve.engine.sequence import Sequence
from alora_serve.model.loader import BaseModel
from alora_serve.model.runner import ModelRunner
from alora_serve.types import FinishReason, SamplingParams, TokenChunk


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of one engine.

    Attributes:
        max_sequences: places in the batch.
        max_step_tokens: prompt tokens of one step, the chunk of a prefill.
        max_mixed_step_tokens: prompt tokens of a step that others decode in: their next token waits for it.
        max_queue: sequences that may wait for a place.
        tenant_share: how much of batch and queue one tenant may hold, so that others find room.
    """

    max_sequences: int = 32
    max_step_tokens: int = 256
    max_mixed_step_tokens: int = 64
    max_queue: int = 100
    tenant_share: float = 0.75

    @property
    def tenant_sequences(self) -> int:
        """Places in the batch that one tenant may have."""
        return max(1, int(self.max_sequences * self.tenant_share))


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence has run to its end in this step. ``reason`` is None for a prefill."""

    sequence: Sequence
    reason: FinishReason | None
    stop_string: str = ""


Share = tuple[Sequence, int]


class Stepper:
    """Runs batches of one model. Not reentrant."""

    def __init__(self, model: BaseModel, cache: PrefixCache, limits: EngineLimits) -> None:
        self._runner = ModelRunner(model)
        self._lora = LoraRows(model.projections, limits.max_sequences, model.device)
        self._cache = cache
        self._limits = limits

    def schedule(self, sequences: Listed[Sequence]) -> list[Share]:
        """Who runs how many tokens next; every sequence has some. Those that wait for a neighbour's KV are left out."""
        for sequence in sequences:
            self._adopt(sequence)
        waiting = followers(sequences)
        ready = [sequence for sequence in sequences if sequence not in waiting]
        shares = share_step(
            [sequence.pending_tokens for sequence in ready],
            self._limits.max_step_tokens,
            self._limits.max_mixed_step_tokens,
            [sequence.request.tenant for sequence in ready],
        )
        return [(sequence, share) for sequence, share in zip(ready, shares, strict=True) if share]

    def _adopt(self, sequence: Sequence) -> None:
        """Take over what a neighbour computed since this sequence's prefix was loaded."""
        if sequence.is_fresh and sequence.computed < sequence.last_base_position:
            prefix = self._cache.longer(sequence.request.chain, sequence.last_base_position, sequence.computed)
            if prefix is not None:
                sequence.adopt(prefix)

    def run(self, shares: Listed[Share], finish: Callable[[Ended], None]) -> Batch:
        """Run the shares in one forward pass, tell sinks what came of it, and ``finish`` what it ends, one by one."""
        batch = arrange(shares, self._lora.standing)
        wanted = [
            sequence.request.sampling is not None and span.end == sequence.known_tokens for sequence, span in batch
        ]
        self._lora.set_rows(adapter_rows(batch))
        try:
            logits = self._runner.forward([span for _, span in batch], wanted, self._lora.plan)
        finally:
            self._lora.clear()
        for sequence, span in batch:
            was_base = sequence.in_base_phase
            sequence.commit(span)
            if was_base:
                sequence.tell_published(tail=sequence.names_tail and sequence.computed >= sequence.prompt_base_end)
        if logits is not None:
            self._sample([sequence for (sequence, _), want in zip(batch, wanted, strict=True) if want], logits, finish)
        for sequence, _ in batch:
            if sequence.request.sampling is None and not sequence.pending_tokens:
                finish(Ended(sequence, None))
        return batch

    def _sample(self, ready: Listed[Sequence], logits: Tensor, finish: Callable[[Ended], None]) -> None:
        params = [sequence.request.sampling or SamplingParams() for sequence in ready]
        prompts, generated = [s.request.prompt for s in ready], [s.generated for s in ready]
        tokens, logprobs = choose_tokens(logits, params, prompts, generated)
        for sequence, token, logprob in zip(ready, tokens, logprobs, strict=True):
            ended = _deliver(sequence, token, logprob)
            if ended is not None:
                finish(ended)


def _deliver(sequence: Sequence, token: int, logprob: float | None) -> Ended | None:
    """Append a token and send it; what it ends, if it does."""
    sampling, text = sequence.request.sampling, sequence.request.text
    if sampling is None or text is None:
        raise RuntimeError("a prefill has no tokens to deliver")
    now = monotonic()
    sequence.first_token_at = sequence.first_token_at or now
    sequence.last_event_at = now
    sequence.generated.append(token)
    delta = text.push((token,))
    sequence.sink(TokenChunk((token,), delta.text, () if logprob is None else (logprob,)))
    if token in sequence.request.end_ids or delta.stop_string is not None:
        return Ended(sequence, FinishReason.STOP, delta.stop_string or "")
    if len(sequence.generated) >= sampling.max_tokens:
        return Ended(sequence, FinishReason.LENGTH)
    return None
