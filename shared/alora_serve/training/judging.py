"""How an adapter does on rows that it was not trained on, without generating: loss, and accuracy over labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alora_serve.errors import ConfigError
from alora_serve.training.adapted import AdaptedModel
from alora_serve.training.encoding import Example, common_beginning
from alora_serve.training.loop import batches, microbatches
from alora_serve.types import TokenIds


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """Where the answers of all labels part: after ``common`` tokens, each goes on with its own."""

    common: TokenIds
    first: tuple[int, ...]

    @classmethod
    def of(cls, answers: Sequence[TokenIds]) -> LabelTokens:
        """Raises :class:`ConfigError` when two answers go on alike where the first two part."""
        common = common_beginning(answers)
        first = tuple(answer[len(common)] for answer in answers)
        if len(set(first)) < len(first):
            raise ConfigError("the labels cannot be told apart by one token of this model: choose other words for them")
        return cls(common, first)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One example: the probabilities of all labels, summing to 1, and whether the right one was highest."""

    probabilities: tuple[float, ...]
    is_right: bool


def judge_labels(
    model: AdaptedModel, examples: Sequence[Example], labels: Sequence[str], tokens: LabelTokens, batch_size: int
) -> list[Judgement]:
    """A judgement for each example, in order; the model is in evaluation mode."""
    found: dict[int, Judgement] = {}
    for batch in batches(examples, batch_size, None):
        logprobs = model.next_logprobs(batch, tokens.common)[:, list(tokens.first)]
        for example, row in zip(batch, logprobs.softmax(-1).tolist(), strict=True):
            best = max(range(len(labels)), key=row.__getitem__)
            found[id(example)] = Judgement(tuple(row), labels[best] == example.target)
    return [found[id(example)] for example in examples]


def mean_loss(model: AdaptedModel, examples: Sequence[Example], batch_size: int, microbatch_tokens: int) -> float:
    """Mean cross-entropy of the answers, in nats a token."""
    total, tokens, reuses = 0.0, 0, model.prefixes is not None
    with torch.no_grad():
        for batch in batches(examples, batch_size, None):
            for part in microbatches(batch, microbatch_tokens, reuses_prefixes=reuses):
                total += model.answer_loss(part).item()
                tokens += sum(len(example.answer_tokens) for example in part)
    return total / tokens
