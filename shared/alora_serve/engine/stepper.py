"""One step of a batch: schedule, forward, publish, sample, deliver. Runs on the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

import torch
from torch import Tensor

from alora_serve.engine.answer import Ending
from alora_serve.engine.batch import Batch, adapter_rows, arrange
from alora_serve.engine.lora_rows import LoraRows
from alora_serve.engine.masks import Mask, MaskWorker
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.renewals import Held, Renewals
from alora_serve.engine.sampling import Chosen, choose_tokens
from alora_serve.engine.scheduler import followers, share_step
from alora_serve.engine.scoring import tell_scores, wanted_rows
from alora_serve.engine.sequence import Sequence
from alora_serve.errors import AloraServeError
from alora_serve.model.loader import BaseModel
from alora_serve.model.runner import ModelRunner
from alora_serve.model.structure.constraint import FormUsedUpError
from alora_serve.types import TokenChunk


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
    """A sequence has run to its end in this step, or to an error. Without either, it is a prefill.

    ``held_back`` is the last of its text, which might have been the beginning of a stop string.
    """

    sequence: Sequence
    ending: Ending | None = None
    held_back: str = ""
    error: AloraServeError | None = None


Share = tuple[Sequence, int]

_NOT_FINITE: Final = (
    "no token can be chosen or scored: the model's logits are infinite or not a number. Weights of the adapter, or of "
    "the model, that come to numbers too large for its dtype do this: train the adapter anew, or serve a wider dtype"
)


class Stepper:
    """Runs batches of one model. Not reentrant."""

    def __init__(self, model: BaseModel, cache: PrefixCache, limits: EngineLimits) -> None:
        self._runner = ModelRunner(model)
        self._masks = MaskWorker()
        self.renewals = Renewals()
        """Sequences that have run, and wait for their form."""
        self._lora = LoraRows(model.projections, limits.max_sequences, model.device)
        self._cache = cache
        self._limits = limits

    def close(self) -> None:
        """End its threads."""
        self._masks.close()

    def schedule(self, sequences: Listed[Sequence]) -> list[Share]:
        """Who runs how many tokens next. Those that wait, for a neighbour's KV or for their form, are left out."""
        sequences = [sequence for sequence in sequences if sequence not in self.renewals]
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
        wanted = [wanted_rows(sequence, span) for sequence, span in batch]
        ready = [s for (s, _), want in zip(batch, wanted, strict=True) if want and s.request.sampling is not None]
        masks = self._masks.start([s.request.answer.constraint if s.request.answer else None for s in ready])
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
        logits, unscored = (None, []) if logits is None else tell_scores(batch, wanted, logits)
        if logits is not None:
            self._sample(ready, logits, masks.result(), finish)
        for sequence, _ in batch:
            if sequence in unscored:
                finish(Ended(sequence, error=AloraServeError(_NOT_FINITE)))
            elif sequence.request.sampling is None and not sequence.pending_tokens:
                finish(Ended(sequence))
        return batch

    def deliver(self, late: Listed[Held], finish: Callable[[Ended], None]) -> None:
        """Give those a token whose form has come, as :meth:`run` does."""
        logits = torch.stack([held.logits for held in late])
        self._sample([held.sequence for held in late], logits, [held.outcome for held in late], finish)

    def _sample(
        self,
        ready: Listed[Sequence],
        logits: Tensor,
        masks: Listed[Mask | AloraServeError],
        finish: Callable[[Ended], None],
    ) -> None:
        """Choose a token for each sequence and deliver it.

        Args:
            ready: those whose next token is due.
            logits: ``[ready, vocabulary]`` float32.
            masks: of each, or why it cannot go on.
            finish: told what ends.
        """
        for sequence, row, mask in zip(ready, logits, masks, strict=True):
            if isinstance(mask, FormUsedUpError):
                self.renewals.hold(sequence, row.clone())  # before it is changed: the draw is made from it yet
        params = [sequence.history.params for sequence in ready]
        allowed = [None if isinstance(mask, AloraServeError) else mask for mask in masks]
        choices = choose_tokens(logits, params, [s.history for s in ready], [len(s.generated) for s in ready], allowed)
        for sequence, choice, mask in zip(ready, choices, masks, strict=True):
            if isinstance(mask, FormUsedUpError):
                continue
            if isinstance(mask, AloraServeError):
                finish(Ended(sequence, error=mask))
                continue
            if choice is None:
                finish(Ended(sequence, error=AloraServeError(_NOT_FINITE)))
                continue
            try:
                ended = _deliver(sequence, choice)
            except AloraServeError as error:  # of this answer's form
                ended = Ended(sequence, error=error)
            if ended is not None:
                finish(ended)


def _deliver(sequence: Sequence, choice: Chosen) -> Ended | None:
    """Append a token and send it; what it comes to, if it is the last.

    Raises:
        AloraServeError: the form of the answer cannot be followed.
    """
    answer = sequence.request.answer
    if answer is None:
        raise RuntimeError("a prefill has no tokens to deliver")
    now = monotonic()
    sequence.first_token_at = sequence.first_token_at or now
    sequence.last_event_at = now
    sequence.append(choice.token_id)
    text, ending = answer.push(choice.token_id)
    chunk = TokenChunk((choice.token_id,), text)
    if choice.logprob is not None:
        spelt = (answer.spell(choice.token_id),) if answer.token_bytes else ()
        top = (answer.likely(choice.top),) if choice.top else ()
        chunk = replace(chunk, logprobs=(choice.logprob,), token_bytes=spelt, top_logprobs=top)
    sequence.sink(chunk)
    if ending is None:
        return None
    return Ended(sequence, ending, held_back="" if ending.stop_string else answer.text.finish())
