"""Runs batches of examples through a PEFT model: losses to train on, label probabilities to judge by.

An aLoRA's batch is its cues and answers alone, behind base KV that a :class:`PrefixCache` keeps. Its columns are::

    [head | padding | rest of the prefix][padding | cue, answer]

A plain LoRA is on from the first token, so its batch is whole prompts and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from alora_serve.training.encoding import Example
from alora_serve.training.prefixes import PrefixCache, PrefixOptions
from alora_serve.types import TokenIds

_IGNORED = -100  # torch's own label for what has no loss


class AdaptedModel:
    """A base model with one adapter on it, and the base KV of all examples it will see."""

    def __init__(self, model: PeftModel, examples: Sequence[Example], options: PrefixOptions | None) -> None:
        """``examples`` are all that will be run; without ``options``, no KV is kept and whole prompts run."""
        self.model = model
        bases = [example.base_tokens for example in examples]
        self.prefixes = PrefixCache(self._base_pass, bases, options) if options and all(bases) else None
        """None where none are kept: a plain LoRA changes every token."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's weights."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def answer_loss(self, examples: Sequence[Example]) -> Tensor:
        """Summed cross-entropy of the answers in nats, differentiable in the adapter."""
        longest = max(len(example.answer_tokens) for example in examples)
        logits = self._logits(examples, [example.answer_tokens[:-1] for example in examples], keep=longest)
        labels = torch.full((len(examples), longest), _IGNORED, device=logits.device)
        for row, example in zip(labels, examples, strict=True):
            row[longest - len(example.answer_tokens) :] = torch.tensor(example.answer_tokens, device=logits.device)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    @torch.no_grad()
    def next_logprobs(self, examples: Sequence[Example], appended: TokenIds) -> Tensor:
        """Log-probabilities of what would be said after the prompt and ``appended``, [batch, vocabulary] in float32."""
        return self._logits(examples, [appended] * len(examples), keep=1)[:, -1].log_softmax(-1)

    def _logits(self, examples: Sequence[Example], appended: Sequence[TokenIds], keep: int) -> Tensor:
        """Logits of the last ``keep`` positions, float32 [batch, keep, vocabulary]. Padded on the left."""
        reuses = self.prefixes is not None
        adapted = [e.cue_tokens + a for e, a in zip(examples, appended, strict=True)]
        fed = adapted if reuses else [e.base_tokens + a for e, a in zip(examples, adapted, strict=True)]
        cached = [len(e.base_tokens) if reuses else 0 for e in examples]
        widest, width = max(cached), max(map(len, fed))
        head = self.prefixes.head_length if self.prefixes else 0
        device = self.model.device
        input_ids = torch.zeros(len(fed), width, dtype=torch.long)
        position_ids = torch.zeros_like(input_ids)
        attention_mask = torch.zeros(len(fed), widest + width, dtype=torch.long)
        attention_mask[:, :head] = 1
        for i, (tokens, length) in enumerate(zip(fed, cached, strict=True)):
            input_ids[i, width - len(tokens) :] = torch.tensor(tokens)
            position_ids[i, width - len(tokens) :] = torch.arange(length, length + len(tokens))
            attention_mask[i, widest - (length - head) : widest] = 1
            attention_mask[i, widest + width - len(tokens) :] = 1
        arguments: dict[str, Any] = {"use_cache": False}
        if self.prefixes is not None:
            cache = self._padded_cache(self.prefixes, [e.base_tokens for e in examples], widest)
            arguments = {"use_cache": True, "cache": cache}
        if all(e.base_tokens for e in examples):
            # Said outright: searching would also find an invocation inside an answer.
            arguments["alora_offsets"] = [len(tokens) for tokens in adapted]
        logits: Tensor = self.model(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            position_ids=position_ids.to(device),
            # As indices: a slice would leave a strided view, for which the head copies its weight once a row.
            logits_to_keep=torch.arange(width - keep, width, device=device),
            **arguments,
        ).logits
        return logits.float()

    def _padded_cache(self, prefixes: PrefixCache, bases: Sequence[TokenIds], width: int) -> DynamicCache:
        """One cache of the prefixes, ``[batch, kv_heads, width, head_dim]`` a layer, zeros between head and rest."""
        rests = [prefixes.rest(tokens) for tokens in bases]
        layers, two, heads, _, head_dim = rests[0].shape
        shape = (layers, two, len(rests), heads, width, head_dim)
        kv = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        if prefixes.head is not None:
            kv[..., : prefixes.head_length, :] = prefixes.head.unsqueeze(2)
        for i, rest in enumerate(rests):
            kv[:, :, i, :, width - rest.shape[3] :] = rest
        return DynamicCache([(keys, values) for keys, values in kv])

    @torch.no_grad()
    def _base_pass(self, tokens: TokenIds, after: Tensor | None) -> Tensor:
        """See :data:`~alora_serve.training.prefixes.BasePass`."""
        # Called without PEFT's wrapper, which alone tells the layers where the adapter begins, an aLoRA stays off; and
        # without the language model head, since nobody reads the logits of a prefix.
        inner: Any = self.model.get_base_model().base_model
        start = 0 if after is None else after.shape[3]
        known = [] if after is None else [(kv[0:1], kv[1:2]) for kv in after.to(self.model.dtype)]
        device = self.model.device
        was_training = inner.training
        inner.train(False)  # or a model with dropout of its own would keep one draw of it for good
        cache = inner(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.arange(start, start + len(tokens), device=device)[None],
            cache=DynamicCache(known),
            use_cache=True,
        ).cache
        inner.train(was_training)
        layers = [torch.cat([layer.keys, layer.values])[:, :, start:] for layer in cache.layers]
        return torch.stack(layers)
