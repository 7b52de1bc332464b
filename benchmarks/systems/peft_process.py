"""Stock transformers and PEFT in a process of their own: the child of ``systems/peft.py``.

Two ways to ask adapters: a plain LoRA recomputes the whole prompt; an aLoRA continues on a deep copy of the base
prefix's cache. The base model continues its cache too, in both. Several adapters asked at once are one batch of mixed
adapters, as PEFT offers it.
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
    def recompute(self, prompts: list[list[int]], adapters: list[str], max_tokens: int) -> dict[str, Any]:
        """Plain LoRAs, from the first token on; several are one batch."""
        began = perf_counter()
        cache = DynamicCache(config=self._config)
        return self._generate(prompts, 0, cache, max_tokens, began, activated=False, **self._turned_on(adapters))

    @torch.inference_mode()
    def cached(
        self, prompts: list[list[int]], base_tokens: int, adapters: list[str], max_tokens: int
    ) -> dict[str, Any]:
        """ALoRAs that turn on at ``base_tokens``, where prompts are the same up to there; several are one batch."""
        began = perf_counter()
        self._extend(prompts[0][:base_tokens])
        cache = copy.deepcopy(self._caches[-1][1])
        if len(prompts) > 1:
            cache.batch_repeat_interleave(len(prompts))
        return self._generate(
            prompts, base_tokens, cache, max_tokens, began, activated=True, **self._turned_on(adapters)
        )

    @torch.inference_mode()
    def base(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """The base model. Its answer is not kept: the conversation goes on with a text that is given."""
        began = perf_counter()
        self._extend(prompt[:-1])
        cache = copy.deepcopy(self._caches[-1][1])
        with self._model.disable_adapter():
            return self._generate([prompt], len(prompt) - 1, cache, max_tokens, began, activated=False)

    def _turned_on(self, adapters: list[str]) -> dict[str, Any]:
        """One adapter is made the active one; for several the model is told at each call whose row is whose."""
        if len(adapters) > 1:
            return {"adapter_names": adapters}
        self._model.set_adapter(adapters[0])
        return {}

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
        self,
        prompts: list[list[int]],
        start: int,
        cache: DynamicCache,
        max_tokens: int,
        began: float,
        *,
        activated: bool,
        **told: Any,
    ) -> dict[str, Any]:
        """Greedy, all prompts in one batch.

        ``alora_offsets``, from where on the adapter is on, counted from the end, goes with every call: without it
        PEFT's aLoRA layers silently run base weights.

        Args:
            start: tokens of each prompt that ``cache`` has.
            told: what else the model is told at each call.
        """
        rests = [prompt[start:] for prompt in prompts]
        longest = max(map(len, rests))
        # Padded on the left, so that every prompt's last token is the batch's last.
        ids = torch.tensor([[0] * (longest - len(rest)) + rest for rest in rests], device=self._device)
        is_token = torch.tensor([[position >= longest - len(rest) for position in range(longest)] for rest in rests])
        mask = torch.cat([torch.ones(len(prompts), start, dtype=torch.bool), is_token], dim=1).to(self._device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        is_padded = not bool(mask.all())
        lengths = list(map(len, rests))
        tokens: list[list[int]] = [[] for _ in prompts]
        first = 0.0
        for _ in range(max_tokens):
            more = {"alora_offsets": lengths} if activated else {}
            more |= {"attention_mask": mask} if is_padded else {}
            out = self._model(
                input_ids=ids,
                cache=cache,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **more,
                **told,
            )
            ids = out.logits[:, -1:].argmax(-1)
            for answer, token in zip(tokens, ids[:, 0].tolist(), strict=True):
                answer.append(token)
            first = first or perf_counter() - began
            positions, lengths = positions[:, -1:] + 1, [1] * len(prompts)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        return {"tokens": tokens, "first_token_seconds": first, "total_seconds": perf_counter() - began}


if __name__ == "__main__":
    answer_lines(lambda given: Peft(**given))
