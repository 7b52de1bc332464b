"""How far answers in bfloat16 are from stock PEFT in float32, and how far mistakes would be: the τ rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from alora_serve.client import PrefixHandle
from deployment import ServedModel
from questions import Question, Read
from tiny_models import forced_greedy, greedy, largest_gap, load_peft

FOREIGN_TOKENS: Final = 16
MISTAKE_TOKENS: Final = 40
"""Of the answers that are wrong on purpose."""

Prompt = tuple[tuple[int, ...], int]
"""All tokens before an answer, and where the invocation begins."""


def gaps(model: ServedModel, found: Sequence[tuple[Question, Read]]) -> list[float]:
    """How far, at worst, a token of each answer lies below the best logit of cold, teacher-forced PEFT in float32."""
    torch.set_num_threads(1)
    largest = []
    for adapter in {question.adapter for question, _ in found}:
        reference = load_peft(model.directory, model.roots[0] / adapter)
        for question, answer in dict.fromkeys(found):
            if question.adapter == adapter:
                prompt, start = _prompt(model, question)
                largest.append(largest_gap(reference, prompt, answer.tokens, start))
    return largest


def mistakes(model: ServedModel, asked: Sequence[Question]) -> dict[str, float]:
    """The largest gap of answers that stock PEFT is made to give wrongly, by mistake; of all adapters, the smallest.

    ``asked``: of each adapter two conversations or more.
    """
    torch.set_num_threads(1)
    base = load_peft(model.directory, None)
    largest: dict[str, list[float]] = {}
    for adapter in {question.adapter for question in asked}:
        peft = load_peft(model.directory, model.roots[0] / adapter)
        prompts = [_prompt(model, question) for question in asked if question.adapter == adapter]
        made = {
            "adapter_off": [greedy(base, prompt, MISTAKE_TOKENS).tokens for prompt, _ in prompts],
            "adapter_one_token_early": [
                forced_greedy(peft, prompt, MISTAKE_TOKENS, start - 1) for prompt, start in prompts
            ],
            "foreign_kv": [
                greedy(peft, _with_the_end_of(other, prompt), MISTAKE_TOKENS).tokens
                for prompt, other in zip(prompts, (*prompts[1:], prompts[0]), strict=True)
            ],
        }
        for mistake, answers in made.items():
            below = [
                largest_gap(peft, prompt, answer, start)
                for (prompt, start), answer in zip(prompts, answers, strict=True)
            ]
            largest.setdefault(mistake, []).append(max(below))
    return {mistake: min(values) for mistake, values in largest.items()}


def _with_the_end_of(other: Prompt, prompt: Prompt) -> tuple[int, ...]:
    """The prompt with the last tokens before its invocation taken from another."""
    (theirs, their_start), (ours, start) = other, prompt
    return ours[: start - FOREIGN_TOKENS] + theirs[their_start - FOREIGN_TOKENS : their_start] + ours[start:]


def _prompt(model: ServedModel, question: Question) -> Prompt:
    if not isinstance(question.about, PrefixHandle):
        raise TypeError("asked by handle alone")
    prompt = model.prompt(question.about, question.adapter)
    return prompt, len(prompt) - len(model.suffix(question.about, question.adapter))
