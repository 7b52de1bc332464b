"""Stock transformers and PEFT in a process of their own: the child of ``systems/peft.py``.

Two ways to ask an adapter: a plain LoRA recomputes the whole prompt; an aLoRA continues on a deep copy of the base
prefix's cache. The base model continues its cache too, in both.
"""

from __future__ import annotations

import copy
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from systems.answering import answer_lines
from transformers import AutoModelForCausalLM, DynamicCache

CONVERSATIONS = 8
"""Whose base caches are kept at a time."""
SAME_CONVERSATION_TOKENS = 64
"""A cache that goes on for no more than this past a prompt's beginning is cut back, not copied: a generation prompt."""


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))


class Peft:
    """One model with many adapters, and the base caches of the conversations that are talked about."""

    def __init__(self, model: str, dtype: str, device: str, adapters: dict[str, str]) -> None:
        """``adapters`` are directories by name."""
        self._device = torch.device(device)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self._config = base.config
        names = list(adapters)
        self._model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(adapters[name], adapter_name=name)
        self._model.eval().to(self._device)
        self._caches: list[tuple[list[int], DynamicCache]] = []

    @torch.inference_mode()
    def warm(self, prefix: list[int]) -> dict[str, float]:
        """Compute what the base cache lacks of a conversation."""
        began = perf_counter()
        computed = self._extend(prefix)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # an answer's tokens wait by themselves
        return {"computed_tokens": computed, "seconds": perf_counter() - began}

    @torch.inference_mode()
    def recompute(self, prompt: list[int], adapter: str, max_tokens: int) -> dict[str, Any]:
        """A plain LoRA, from the first token on."""
        began = perf_counter()
        self._model.set_adapter(adapter)
        cache = DynamicCache(config=self._config)
        return self._generate(prompt, 0, cache, max_tokens, began, activated=False)

    @torch.inference_mode()
    def cached(self, prompt: list[int], base_tokens: int, adapter: str, max_tokens: int) -> dict[str, Any]:
        """An aLoRA that turns on at ``base_tokens``."""
        began = perf_counter()
        self._extend(prompt[:base_tokens])
        self._model.set_adapter(adapter)
        cache = copy.deepcopy(self._caches[-1][1])
        return self._generate(prompt, base_tokens, cache, max_tokens, began, activated=True)

    @torch.inference_mode()
    def base(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """The base model. Its answer is not kept: the conversation goes on with a text that is given."""
        began = perf_counter()
        self._extend(prompt[:-1])
        cache = copy.deepcopy(self._caches[-1][1])
        with self._model.disable_adapter():
            return self._generate(prompt, len(prompt) - 1, cache, max_tokens, began, activated=False)

    def _extend(self, prefix: list[int]) -> int:
        """Make the cache of ``prefix`` the newest; the number of tokens computed for it."""
        tokens, cache = self._nearest(prefix)
        rest = prefix[len(tokens) :]
        if rest:
            positions = torch.arange(len(tokens), len(prefix), device=self._device)[None]
            ids = torch.tensor([rest], device=self._device)
            with self._model.disable_adapter():
                self._model(input_ids=ids, cache=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        self._caches.append((prefix, cache))
        del self._caches[:-CONVERSATIONS]
        return len(rest)

    def _nearest(self, prefix: list[int]) -> tuple[list[int], DynamicCache]:
        """A cache of the longest known beginning of ``prefix``, out of the list where it is the same conversation's."""
        shared = [_common(tokens, prefix) for tokens, _ in self._caches]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is None or shared[best] == 0:
            return [], DynamicCache(config=self._config)
        tokens, cache = self._caches[best]
        beyond = len(tokens) - shared[best]
        if beyond <= SAME_CONVERSATION_TOKENS:
            del self._caches[best]
        else:
            cache = copy.deepcopy(cache)
        if beyond:
            cache.crop(-beyond)
        return prefix[: shared[best]], cache

    def _generate(
        self, prompt: list[int], start: int, cache: DynamicCache, max_tokens: int, began: float, *, activated: bool
    ) -> dict[str, Any]:
        """Greedy. ``alora_offsets`` goes with every call: without it PEFT's aLoRA layers silently run base weights."""
        ids = torch.tensor([prompt[start:]], device=self._device)
        tokens: list[int] = []
        first = 0.0
        for _ in range(max_tokens):
            positions = torch.arange(start, start + ids.shape[1], device=self._device)[None]
            more = {"alora_offsets": [ids.shape[1]]} if activated else {}
            out = self._model(
                input_ids=ids,
                cache=cache,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **more,
            )
            start += ids.shape[1]
            ids = out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
            first = first or perf_counter() - began
        return {"tokens": tokens, "first_token_seconds": first, "total_seconds": perf_counter() - began}


if __name__ == "__main__":
    answer_lines(lambda given: Peft(**given))
