"""The optimisation: AdamW on the answers alone, in batches of like length, repeatable by its seed and resumable."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from alora_serve.training.adapted import AdaptedModel
from alora_serve.training.encoding import Example
from alora_serve.training.recipe import Recipe

POOL_BATCHES: Final = 8
"""Batches whose rows are drawn together and sorted by length: less padding, and still another batch each epoch."""


@dataclass(slots=True)
class Progress:
    """Where a training stands; mutable, and what a checkpoint keeps beside weights.

    Attributes:
        step: optimiser steps done.
        losses: mean loss of each step, in nats a token.
        validation: one entry for each epoch done.
        cpu_seconds: spent so far, by all processes that worked on it.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    cpu_seconds: float = 0.0


class Observer(Protocol):
    """Is told how training goes, between steps."""

    def on_step(self, progress: Progress, total_steps: int) -> None:
        """A step is done."""

    def on_epoch(self, progress: Progress, epoch: int) -> None:
        """An epoch is done; the model is in evaluation mode. Adds to ``progress.validation``."""


class Trainer:
    """One adapter's training. Between steps, :attr:`progress`, the weights and the optimiser are all its state.

    Attributes:
        steps_per_epoch: optimiser steps that take every example once.
    """

    def __init__(
        self, model: AdaptedModel, examples: Sequence[Example], recipe: Recipe, microbatch_tokens: int
    ) -> None:
        """``microbatch_tokens`` bounds the padded tokens that run at once, and so memory; gradients add up."""
        self.model = model
        self.progress = Progress()
        self._examples = examples
        self._recipe = recipe
        self._microbatch_tokens = microbatch_tokens
        self.steps_per_epoch = sum(1 for _ in batches(examples, recipe.batch_size, random.Random(0)))
        self.optimizer = torch.optim.AdamW(model.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self._recipe.epochs * self.steps_per_epoch

    def run(self, observer: Observer) -> None:
        """Train from where :attr:`progress` stands to the end."""
        while self.progress.step < self.total_steps:
            epoch, done = divmod(self.progress.step, self.steps_per_epoch)
            order = random.Random(f"{self._recipe.seed} {epoch}")  # of the epoch alone: a resumed one draws it again
            self.model.model.train()
            for batch in list(batches(self._examples, self._recipe.batch_size, order))[done:]:
                self.progress.losses.append(self._step(batch))
                self.progress.step += 1
                observer.on_step(self.progress, self.total_steps)
            self.model.model.eval()
            observer.on_epoch(self.progress, epoch + 1)

    def _step(self, batch: Sequence[Example]) -> float:
        answer_tokens = sum(len(example.answer_tokens) for example in batch)
        reuses = self.model.prefixes is not None
        total = 0.0
        for part in microbatches(batch, self._microbatch_tokens, reuses_prefixes=reuses):
            loss = self.model.answer_loss(part) / answer_tokens
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * _schedule(self.progress.step, self.total_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def _schedule(step: int, total: int) -> float:
    """Share of the learning rate: up over a tenth of the steps, then linearly down to zero."""
    warm_up = max(1, total // 10)
    return min((step + 1) / warm_up, (total - step) / max(1, total - warm_up))


def batches(examples: Sequence[Example], batch_size: int, shuffle: random.Random | None) -> Iterator[list[Example]]:
    """Every example once, in batches of similar length; ``shuffle`` draws which are together and in which order."""
    if shuffle is None:
        order = sorted(examples, key=lambda example: example.prompt_tokens)
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))
        return
    order = list(examples)
    shuffle.shuffle(order)
    pool = POOL_BATCHES * batch_size
    grouped: list[list[Example]] = []
    for i in range(0, len(order), pool):
        grouped.extend(batches(order[i : i + pool], batch_size, None))
    shuffle.shuffle(grouped)
    yield from grouped


def microbatches(batch: Sequence[Example], most_tokens: int, *, reuses_prefixes: bool) -> Iterator[Sequence[Example]]:
    """``batch`` in parts that weigh at most ``most_tokens``, padding included; at least one example each.

    A token that runs weighs one, a token of kept KV an eighth: so much less is held of it for the way back.
    """

    def weight(example: Example) -> float:
        kept = len(example.base_tokens) if reuses_prefixes else 0
        return example.prompt_tokens - kept + len(example.answer_tokens) + kept / 8

    part: list[Example] = []
    for example in sorted(batch, key=weight):
        if part and (len(part) + 1) * weight(example) > most_tokens:
            yield part
            part = []
        part.append(example)
    yield part
