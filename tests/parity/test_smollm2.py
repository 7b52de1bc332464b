"""The real model: tokens and logits of stock PEFT in fp32, and right by the τ rule in bf16.

In bf16 rounding depends on matrix shapes, so equal tokens are not promised: stock ``generate`` itself differs. A
delivered greedy token is *wrong* when, teacher-forced through a cold fp32 PEFT run, its logit is more than τ below the
largest one.
τ was fixed from cold bf16 PEFT against fp32 PEFT. On a processor without bf16 of its own, over 12 answers of 24 tokens
(the two aLoRAs below and the base model, four conversations each), the largest gap is 0.19; on the conversations below
it is 0.12, which ``test_stock_peft_in_bf16_stays_below_tau`` finds again. The mistakes made at the end exceed τ by far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from alora_serve.adapters.activation import place_invocation
from alora_serve.engine import decoder as decoder_module
from alora_serve.engine.lora_rows import LoraRows
from alora_serve.kv.store import KVStore
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import ChatMessage, PrefillResult, Prompt, TokenIds
from in_process import MemoryStore, Stack, open_stack
from recorded_logits import generate_with_logits
from tiny_models import greedy, load_peft, save_adapter

TAU = 0.25
ANSWER_TOKENS = 24
ROUNDING = 5e-4
"""Logits reach 45 here, and PEFT is up to 1.2e-4 from itself, between computing a prompt whole and an answer after it.
Ours were up to 2.7e-4 from PEFT with weights packed for oneDNN, whose fp32 products round more, and 0.9e-4 without."""
QUESTIONS = (
    (
        "The Amazon rainforest covers most of the Amazon basin of South America. This basin holds seven million square "
        "kilometres, of which five and a half million are covered by the rainforest. The region includes territory of "
        "nine nations. The majority of the forest lies in Brazil, with 60% of it, followed by Peru with 13% and "
        "Colombia with 10%. Which country holds most of the rainforest?"
    ),
    "Write a short poem about the sea, then explain in two sentences what a tide is and why there are two a day.",
)
STRENGTHS = {"certainty": 64, "generation-prompt": 16}
"""``lora_alpha``. At 16, leaving the first one out would change too little to be noticed; at 64, the second one would
make stock PEFT itself differ between fp32 and bf16 by more than τ (0.36)."""
INVOCATIONS = {"certainty": "<|im_start|>certainty<|im_end|>", "generation-prompt": "<|im_start|>assistant\n"}


@pytest.fixture(scope="module")
def adapters(demo_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_directory)
    root = tmp_path_factory.mktemp("smollm2-adapters")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for seed, (name, text) in enumerate(INVOCATIONS.items()):
        invocation = tokenizer.encode(text, add_special_tokens=False)
        settings = {
            "r": 16,
            "lora_alpha": STRENGTHS[name],
            "target_modules": targets,
            "alora_invocation_tokens": invocation,
        }
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


def _largest_gap(
    reference: PreTrainedModel | PeftModel, prompt: TokenIds, answer: TokenIds, invocation_start: int | None
) -> float:
    """How far, at worst, a delivered token's logit lies below the largest in a cold, teacher-forced fp32 PEFT run."""
    arguments = {}
    if invocation_start is not None:
        arguments["alora_offsets"] = [len(prompt) + len(answer) - invocation_start]
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = reference(input_ids=ids, **arguments).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits[range(len(answer)), list(answer)]
    return float((logits.max(-1).values - chosen).max())


@pytest.mark.parametrize("adapter", ["certainty", "generation-prompt", "lora", ""])
async def test_served_answers_are_pefts(
    model: BaseModel, demo_model_directory: Path, adapters: Path, adapter: str
) -> None:
    peft = load_peft(demo_model_directory, adapters / adapter if adapter else None)
    async with open_stack(model, MemoryStore(), adapters) as stack:
        for question in QUESTIONS:
            prefilled = await _prefilled(stack, question)
            answer, logits = await generate_with_logits(stack, prefilled.handle, adapter, max_tokens=ANSWER_TOKENS)
            prompt = _prompt(prefilled, stack, adapter)
            if model.dtype == "float32":
                reference = greedy(peft, prompt, ANSWER_TOKENS)
                assert answer.tokens == reference.tokens
                torch.testing.assert_close(logits, reference.logits, rtol=0, atol=ROUNDING)
            else:
                assert _largest_gap(peft, prompt, answer.tokens, answer.started.invocation_start) <= TAU


async def test_a_worker_that_fetches_gives_the_bits_of_one_that_has_it_resident(
    model: BaseModel, adapters: Path, make_store: Callable[[], KVStore]
) -> None:
    with closing(make_store()) as store:
        async with open_stack(model, store, adapters) as prefill:
            prefilled = await _prefilled(prefill, QUESTIONS[1])
            expected, expected_logits = await generate_with_logits(prefill, prefilled.handle, "certainty", max_tokens=8)
    with closing(make_store()) as store:
        async with open_stack(model, store, adapters) as cold:
            answer, logits = await generate_with_logits(cold, prefilled.handle, "certainty", max_tokens=8)
    assert torch.equal(logits, expected_logits)
    assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
    usage, tokens = answer.finished.usage, len(prefilled.handle.prefix_tokens)
    assert (usage.fetched_tokens, usage.fetched_bytes) == (tokens, tokens * model.layout.bytes_per_token)
    assert expected.finished.usage.fetched_bytes == 0


@pytest.mark.parametrize("model", ["float32"], indirect=True)
async def test_a_mixed_batch_of_six_equals_solo_runs(model: BaseModel, adapters: Path) -> None:
    requests = [("certainty", 0), ("generation-prompt", 0), ("", 0), ("lora", 1), ("certainty", 1), ("", 1)]
    async with open_stack(model, MemoryStore(), adapters) as stack:
        handles = [(await _prefilled(stack, question)).handle for question in QUESTIONS]
        asked = [(handles[question], adapter) for adapter, question in requests]
        solo = [await stack.generate(handle, adapter) for handle, adapter in asked]
        mixed = await asyncio.gather(*(stack.generate(handle, adapter) for handle, adapter in asked))
        assert stack.metrics.counts["peak running"] == len(requests)
    assert [answer.tokens for answer in mixed] == [answer.tokens for answer in solo]


@pytest.mark.parametrize("adapter", ["certainty", "generation-prompt", ""])
def test_stock_peft_in_bf16_stays_below_tau(
    demo_model_directory: Path, adapters: Path, adapter: str, record_property: Callable[[str, object], None]
) -> None:
    """What τ must tell mistakes from: the rounding of bf16 itself, without any code of ours."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_directory)
    path = adapters / adapter if adapter else None
    exact, rounded = (load_peft(demo_model_directory, path, dtype) for dtype in (torch.float32, torch.bfloat16))
    suffix = tokenizer.encode(INVOCATIONS[adapter or "generation-prompt"], add_special_tokens=False)
    gaps = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
        prefix = tokenizer.encode(text, add_special_tokens=False)
        prompt = (*prefix, *suffix)
        answer = greedy(rounded, prompt, ANSWER_TOKENS).tokens
        gaps.append(_largest_gap(exact, prompt, answer, len(prefix) if adapter else None))
    record_property("gaps", str(gaps))
    assert max(gaps) < TAU, gaps


@pytest.mark.parametrize("mistake", ["adapter off", "one token early", "foreign KV"])
async def test_the_tau_rule_catches_mistakes(
    model: BaseModel,
    demo_model_directory: Path,
    adapters: Path,
    mistake: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    if mistake == "adapter off":
        monkeypatch.setattr(LoraRows, "set_rows", lambda self, rows: None)
    elif mistake == "one token early":
        # What llama.cpp does. The invocation then starts on the conversation's last token.
        def early(**arguments: object):  # type: ignore[no-untyped-def]
            placed = place_invocation(**arguments)  # type: ignore[arg-type]
            return replace(placed, invocation_start=(placed.invocation_start or 0) - 1)

        monkeypatch.setattr(decoder_module, "place_invocation", early)
    peft = load_peft(demo_model_directory, adapters / "certainty")
    gaps = []
    for question, other in zip(QUESTIONS, reversed(QUESTIONS), strict=True):
        async with open_stack(model, MemoryStore(), adapters) as stack:
            prefilled = await _prefilled(stack, question)
            if mistake == "foreign KV":
                foreign = await _prefilled(stack, other)
                _overwrite_resident_kv(stack, prefilled, foreign)
            answer = await stack.generate(prefilled.handle, "certainty", max_tokens=ANSWER_TOKENS)
            prompt, start = _prompt(prefilled, stack, "certainty"), len(prefilled.handle.prefix_tokens)
            gaps.append(_largest_gap(peft, prompt, answer.tokens, start))
    record_property("gaps", str(gaps))
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
