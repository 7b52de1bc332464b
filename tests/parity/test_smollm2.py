"""The real model: token-equal to stock PEFT in fp32, and right by the τ rule in bf16.

In bf16 rounding depends on matrix shapes, so equal tokens are not promised: stock ``generate`` itself differs. A
delivered greedy token is *wrong* when, teacher-forced through a cold fp32 PEFT run, its logit is more than τ below the
largest one.
τ was fixed from cold bf16 PEFT against fp32 PEFT: over 12 answers of 24 tokens (two aLoRAs and the base model, four
conversations each) the largest gap was 0.105. The controls below exceed it by far: one token early, 3.8.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from alora_serve.adapters.activation import place_invocation
from alora_serve.engine import decoder as decoder_module
from alora_serve.engine.lora_rows import LoraRows
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import ChatMessage, PrefillResult, Prompt
from in_process import Answer, MemoryStore, Stack, open_stack
from tiny_models import load_reference, peft_generate, save_adapter

TAU = 0.25
ANSWER_TOKENS = 24
QUESTIONS = (
    (
        "The Amazon rainforest covers most of the Amazon basin of South America. This basin holds seven million square "
        "kilometres, of which five and a half million are covered by the rainforest. The region includes territory of "
        "nine nations. The majority of the forest lies in Brazil, with 60% of it, followed by Peru with 13% and "
        "Colombia with 10%. Which country holds most of the rainforest?"
    ),
    "Write a short poem about the sea, then explain in two sentences what a tide is and why there are two a day.",
)
INVOCATIONS = {"certainty": "<|im_start|>certainty<|im_end|>", "generation-prompt": "<|im_start|>assistant\n"}


@pytest.fixture(scope="module")
def adapters(demo_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_directory)
    root = tmp_path_factory.mktemp("smollm2-adapters")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for seed, (name, text) in enumerate(INVOCATIONS.items()):
        invocation = tokenizer.encode(text, add_special_tokens=False)
        settings = {"r": 16, "lora_alpha": 64, "target_modules": targets, "alora_invocation_tokens": invocation}
        save_adapter(demo_model_directory, root / name, seed=seed, **settings)
    save_adapter(demo_model_directory, root / "lora", seed=7, r=16, lora_alpha=16, target_modules=targets)
    return root


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, demo_model_directory: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(demo_model_directory, dtype=request.param)


async def _prefilled(stack: Stack, question: str) -> PrefillResult:
    return await stack.prefill(Prompt(messages=(ChatMessage("user", question),)))


def _prompt(prefilled: PrefillResult, stack: Stack, adapter: str) -> tuple[int, ...]:
    """What PEFT must be given to be asked the same."""
    handle = prefilled.handle
    listed = {info.name: info for info in stack.adapters.list_adapters()}
    if adapter == "certainty":
        return handle.prefix_tokens + listed[adapter].invocation_tokens
    return handle.prefix_tokens + handle.generation_prompt_tokens


def _largest_gap(directory: Path, adapter: Path | None, prompt: tuple[int, ...], answer: Answer) -> float:
    """How far, at worst, a delivered token's logit lies below the largest in a cold, teacher-forced fp32 PEFT run."""
    model = load_reference(directory)
    arguments = {}
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
        if answer.started.invocation_start is not None:
            arguments["alora_offsets"] = [len(prompt) + len(answer.tokens) - answer.started.invocation_start]
    ids = torch.tensor([prompt + answer.tokens])
    with torch.no_grad():
        logits = model(input_ids=ids, **arguments).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits[range(len(answer.tokens)), list(answer.tokens)]
    return float((logits.max(-1).values - chosen).max())


@pytest.mark.parametrize("adapter", ["certainty", "generation-prompt", "lora", ""])
async def test_served_answers_are_pefts(
    model: BaseModel, demo_model_directory: Path, adapters: Path, adapter: str
) -> None:
    async with open_stack(model, MemoryStore(), adapters) as stack:
        for question in QUESTIONS:
            prefilled = await _prefilled(stack, question)
            answer = await stack.generate(prefilled.handle, adapter, max_tokens=ANSWER_TOKENS)
            prompt = _prompt(prefilled, stack, adapter)
            path = adapters / adapter if adapter else None
            if model.dtype == "float32":
                assert answer.tokens == peft_generate(demo_model_directory, path, prompt, ANSWER_TOKENS).tokens
            else:
                assert _largest_gap(demo_model_directory, path, prompt, answer) <= TAU


@pytest.mark.parametrize("mistake", ["adapter off", "one token early", "foreign KV"])
async def test_the_tau_rule_catches_mistakes(
    model: BaseModel, demo_model_directory: Path, adapters: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mistake == "adapter off":
        monkeypatch.setattr(LoraRows, "set_rows", lambda self, rows: None)
    elif mistake == "one token early":
        # What llama.cpp does. The invocation then starts on the conversation's last token.
        def early(**arguments: object):  # type: ignore[no-untyped-def]
            placed = place_invocation(**arguments)  # type: ignore[arg-type]
            return replace(placed, invocation_start=(placed.invocation_start or 0) - 1)

        monkeypatch.setattr(decoder_module, "place_invocation", early)
    gaps = []
    async with open_stack(model, MemoryStore(), adapters) as stack:
        for question, other in zip(QUESTIONS, reversed(QUESTIONS), strict=True):
            prefilled = await _prefilled(stack, question)
            if mistake == "foreign KV":
                foreign = await _prefilled(stack, other)
                _overwrite_resident_kv(stack, prefilled, foreign)
            answer = await stack.generate(prefilled.handle, "certainty", max_tokens=ANSWER_TOKENS)
            start = len(prefilled.handle.prefix_tokens)
            answer = replace(answer, started=replace(answer.started, invocation_start=start))
            prompt = _prompt(prefilled, stack, "certainty")
            gaps.append(_largest_gap(demo_model_directory, adapters / "certainty", prompt, answer))
    assert max(gaps) > TAU, gaps


def _overwrite_resident_kv(stack: Stack, victim: PrefillResult, source: PrefillResult) -> None:
    """Put the source conversation's last tokens' KV where the victim's lies; both share their system prompt."""
    prefixes = []
    for prefilled in (victim, source):
        chain = stack.core.blocks.chain(prefilled.handle.prefix_tokens)
        prefixes.append(stack.core.cache.acquire(chain, len(chain)))
    into, out_of = (prefix.slices[-1] for prefix in prefixes)
    assert into.segment is not out_of.segment
    count = min(into.tokens, out_of.tokens)
    into.segment.data[:, :, :, into.offset + into.tokens - count : into.offset + into.tokens] = out_of.segment.data[
        :, :, :, out_of.offset + out_of.tokens - count : out_of.offset + out_of.tokens
    ]
    for prefix in prefixes:
        stack.core.cache.release(prefix)
