"""Trains and scores one adapter on labelled conversations; nothing here reads a command line or prints.

An example is three runs of tokens, tokenized apart and joined as ids, exactly as the server joins them::

    [prefix: the rendered conversation][cue][target, end of turn]

For an aLoRA the cue is its invocation: the adapter is on from there, and everything before is base-model work. The loss
sees the target only, so no gradient ever needs the prefix: its keys and values are computed once with the adapter off
and kept, and a training step runs just the cue and the target. For a plain LoRA the cue is the template's generation
prompt, the adapter is on from token 0, and every step runs the whole prompt.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedTokenizerBase

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [num_kv_heads, tokens, head_dim]."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data file."""

    messages: list[dict[str, str]]
    documents: list[dict[str, str]]
    target: str


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids."""

    prefix_tokens: tuple[int, ...]
    cue_tokens: tuple[int, ...]
    target: str

    @property
    def num_tokens(self) -> int:
        """Prompt length in tokens."""
        return len(self.prefix_tokens) + len(self.cue_tokens)


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to optimise. AdamW, linear warm-up over a tenth of the steps, then linear decay to zero."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of ``total`` examples were right."""

    correct: int
    total: int

    def __str__(self) -> str:
        """Percentage with its 95 % Wilson interval."""
        n, z = self.total, 1.96
        share = self.correct / n
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return f"{share:.1%} ({centre - half:.1%} to {centre + half:.1%}, n = {n})"


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file: objects with ``messages``, ``target`` and, optionally, ``documents``.

    Raises:
        ValueError: a line is not such an object; names the file and the line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            rows.append(Row(list(record["messages"]), list(record.get("documents") or []), str(record["target"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected an object with messages and target: {error!r}") from error
    return rows


def encode(
    tokenizer: PreTrainedTokenizerBase, row: Row, invocation_tokens: Sequence[int] | None, instruction: str = ""
) -> Example:
    """Render ``row`` as the server does; without ``invocation_tokens`` the cue is the generation prompt.

    Args:
        instruction: a further user message, for asking the base model in words.

    Raises:
        ValueError: the chat template ignores the row's documents, or its generation prompt is not a pure suffix.
    """
    messages = [*row.messages, {"role": "user", "content": instruction}] if instruction else row.messages
    prefix = _render(tokenizer, messages, row.documents, with_generation_prompt=False)
    if row.documents and prefix == _render(tokenizer, messages, [], with_generation_prompt=False):
        raise ValueError("this model's chat template ignores documents: put their text into a message")
    if invocation_tokens is not None:
        return Example(prefix, tuple(invocation_tokens), row.target)
    whole = _render(tokenizer, messages, row.documents, with_generation_prompt=True)
    if whole[: len(prefix)] != prefix:
        raise ValueError("this model's chat template does not append its generation prompt to the conversation")
    return Example(prefix, whole[len(prefix) :], row.target)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    documents: list[dict[str, str]],
    *,
    with_generation_prompt: bool,
) -> tuple[int, ...]:
    rendered: Any = tokenizer.apply_chat_template(
        messages,
        documents=documents or None,
        add_generation_prompt=with_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    return tuple(rendered)


class Scorer:
    """Runs prompts through a PEFT model, with base prefixes kept between calls for an aLoRA.

    Args:
        model: holds one adapter.
        tokenizer: of the base model.
        prefix_budget_bytes: how many bytes of prefix keys and values to keep; what is beyond is computed each time.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prefix_budget_bytes: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer names no end-of-sequence token")
        self.model = model
        self._tokenizer = tokenizer
        self._reuses_prefixes = bool(getattr(model.peft_config["default"], "alora_invocation_tokens", None))
        self._budget_bytes = prefix_budget_bytes
        self._kept: dict[tuple[int, ...], list[LayerKV]] = {}

    def target_loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Mean cross-entropy in nats a token of the targets and their end of turn, differentiable in the adapter."""
        targets = [[*self.encode_target(example.target), int(self._tokenizer.eos_token_id)] for example in examples]
        longest = max(map(len, targets))
        logits = self._logits(examples, [target[:-1] for target in targets], keep=longest)
        labels = torch.full((len(targets), longest), -100)
        for i, target in enumerate(targets):
            labels[i, longest - len(target) :] = torch.tensor(target)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def next_token_logits(self, examples: Sequence[Example]) -> torch.Tensor:
        """What the model would say first, float32 [batch, vocabulary]."""
        return self._logits(examples, [[]] * len(examples), keep=1)[:, -1]

    def encode_target(self, target: str) -> list[int]:
        """Token ids of an answer, tokenized apart."""
        return list(self._tokenizer.encode(target, add_special_tokens=False))

    def _logits(self, examples: Sequence[Example], appended: Sequence[Sequence[int]], keep: int) -> torch.Tensor:
        """Logits of the last ``keep`` positions of prompts with appended tokens, float32 [batch, keep, vocabulary].

        All is padded on the left, so that everybody ends in the last column. With prefixes, the columns are
        [padding | prefix | padding | cue, appended].
        """
        prefixes = [self._prefix(e.prefix_tokens) for e in examples] if self._reuses_prefixes else []
        prefix_lengths = [len(e.prefix_tokens) if prefixes else 0 for e in examples]
        heads = [() if prefixes else e.prefix_tokens for e in examples]
        fed = [[*h, *e.cue_tokens, *a] for h, e, a in zip(heads, examples, appended, strict=True)]
        cached, width = max(prefix_lengths), max(map(len, fed))
        input_ids = torch.zeros(len(fed), width, dtype=torch.long)
        position_ids = torch.zeros(len(fed), width, dtype=torch.long)
        attention_mask = torch.zeros(len(fed), cached + width, dtype=torch.long)
        for i, (tokens, length) in enumerate(zip(fed, prefix_lengths, strict=True)):
            input_ids[i, width - len(tokens) :] = torch.tensor(tokens)
            position_ids[i, width - len(tokens) :] = torch.arange(length, length + len(tokens))
            attention_mask[i, cached - length : cached] = 1
            attention_mask[i, cached + width - len(tokens) :] = 1
        logits: torch.Tensor = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_padded_cache(prefixes, cached) if prefixes else None,
            use_cache=bool(prefixes),
            # As indices: a slice would leave a strided view, for which the head copies its weight once a row.
            logits_to_keep=torch.arange(width - keep, width),
        ).logits
        return logits.float()

    @torch.no_grad()
    def _prefix(self, tokens: tuple[int, ...]) -> list[LayerKV]:
        if tokens in self._kept:
            return self._kept[tokens]
        # Called without PEFT's wrapper, which alone tells the layers where the adapter begins, an aLoRA stays off; and
        # without the language model head, since nobody reads the logits of a prefix.
        inner: Any = self.model.get_base_model().base_model
        cache = inner(input_ids=torch.tensor([tokens]), use_cache=True).cache
        computed = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        num_bytes = sum(keys.nbytes + values.nbytes for keys, values in computed)
        if num_bytes <= self._budget_bytes:
            self._budget_bytes -= num_bytes
            self._kept[tokens] = computed
        return computed


def _padded_cache(prefixes: Sequence[list[LayerKV]], width: int) -> DynamicCache:
    """One cache [batch, num_kv_heads, width, head_dim] a layer out of single prefixes, zeros on the left."""

    def stack(layer: int, part: int) -> torch.Tensor:
        rows = [prefix[layer][part] for prefix in prefixes]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, width - row.shape[1], 0)) for row in rows])

    return DynamicCache([(stack(layer, 0), stack(layer, 1)) for layer in range(len(prefixes[0]))])


def batches(examples: Sequence[Example], batch_size: int, shuffle: random.Random | None) -> Iterator[list[Example]]:
    """Every example once, in batches of similar length; ``shuffle`` draws which are together and in which order."""
    if shuffle is None:
        order = sorted(examples, key=lambda example: example.num_tokens)
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))
        return
    order = list(examples)
    shuffle.shuffle(order)
    pool = 8 * batch_size
    grouped: list[list[Example]] = []
    for i in range(0, len(order), pool):
        grouped.extend(batches(order[i : i + pool], batch_size, None))
    shuffle.shuffle(grouped)
    yield from grouped


def train(
    scorer: Scorer,
    examples: Sequence[Example],
    settings: TrainingSettings,
    on_step: Callable[[int, int, float], None],
    on_epoch: Callable[[int], None],
) -> int:
    """Train the adapter in place on the targets alone and return the number of steps taken.

    The same seed, data, thread count and software give the same weights.

    Args:
        on_step: told steps done, steps in all, and the step's mean loss a token.
        on_epoch: told epochs done, with the model in evaluation mode.
    """
    torch.manual_seed(settings.seed)
    shuffle = random.Random(settings.seed)
    parameters = [parameter for parameter in scorer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    total = settings.epochs * sum(1 for _ in batches(examples, settings.batch_size, random.Random(settings.seed)))
    warm_up = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (total - step) / max(1, total - warm_up))
    )
    step = 0
    for epoch in range(settings.epochs):
        scorer.model.train()
        for batch in batches(examples, settings.batch_size, shuffle):
            loss = scorer.target_loss(batch)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            on_step(step, total, loss.item())
        scorer.model.eval()
        on_epoch(epoch + 1)
    return step


def accuracy(scorer: Scorer, examples: Sequence[Example], candidates: Sequence[str], batch_size: int) -> Accuracy:
    """How often the right target's first token is more probable than those of the other ``candidates``.

    Raises:
        ValueError: two candidates begin with the same token, so that the first token does not tell them apart.
    """
    first_tokens = [scorer.encode_target(candidate)[0] for candidate in candidates]
    if len(set(first_tokens)) < len(candidates):
        raise ValueError(f"the answers {list(candidates)} do not all begin with different tokens")
    correct = 0
    for batch in batches(examples, batch_size, None):
        best = scorer.next_token_logits(batch)[:, first_tokens].argmax(dim=1).tolist()
        correct += sum(candidates[i] == example.target for i, example in zip(best, batch, strict=True))
    return Accuracy(correct, len(examples))
