"""The real model: tokens and logits of stock PEFT in fp32, and right by the τ rule in bf16.

In fp32 the logits of plain weights are within 1e-4 of those that stock PEFT computes in float64. (From PEFT's own fp32
logits they may be as far as both are from float64 together; a processor with AVX-512 gives 1.05e-4 once.) Packed
weights round more, and the strong adapter magnifies rounding so much that PEFT computing a prompt at once and token by
token is up to 2.5e-4 from itself. There the measure is how far PEFT's logits are from the float64 model's: ours may be
a few times as far.

In bf16 rounding depends on matrix shapes, so equal tokens are not promised: stock ``generate`` itself differs. A
delivered greedy token is *wrong* when, teacher-forced through a cold fp32 PEFT run, its logit is more than τ below the
largest one.
τ was fixed from cold bf16 PEFT against fp32 PEFT. On a processor without bf16 of its own, over 12 answers of 24 tokens
(the two aLoRAs below and the base model, four conversations each), the largest gap is 0.19; on the conversations below
it is 0.12, which ``test_stock_peft_in_bf16_stays_below_tau`` finds again. The mistakes made at the end exceed τ by far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from alora_serve.adapters.activation import place_invocation
from alora_serve.engine import plan as plan_module
from alora_serve.engine.lora_rows import LoraRows
from alora_serve.kv.store import KVStore
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import ChatMessage, PrefillResult, Prompt, TokenIds
from in_process import MemoryStore, Stack, open_stack
from recorded_logits import generate_with_logits
from tiny_models import TAU, forced_logits, greedy, largest_gap, load_peft, save_adapter

ANSWER_TOKENS = 24
ROUNDING = 1e-4
"""Largest difference from float64's logits, which reach 36 here, with plain weights. On two processors with several
sets of kernels each it was at most 0.76e-4; that of PEFT's own fp32 logits, 0.9e-4."""
TIMES_PEFTS = 3.0
"""Largest distance from the float64 model, in PEFT's own largest ones with that kind of adapter. Here it is 1.2 to 1.8;
with other kernels (``MKL_CBWR``) up to 2.1, with other conversations up to 2.7."""
QUESTIONS = (
    (
        "The Amazon rainforest covers most of the Amazon basin of South America. This basin holds seven million square "
        "kilometres, of which five and a half million are covered by the rainforest. The region includes territory of "
        "nine nations. The majority of the forest lies in Brazil, with 60% of it, followed by Peru with 13% and "
        "Colombia with 10%. Which country holds most of the rainforest?"
    ),
    "Write a short poem about the sea, then explain in two sentences what a tide is and why there are two a day.",
)
STRENGTHS = {"certainty": 64, "generation-prompt": 16, "mild": 16}
"""``lora_alpha``. At 16, leaving the first one out would change too little to be noticed; at 64, the second one would
make stock PEFT itself differ between fp32 and bf16 by more than τ (0.36)."""
APPENDED, ANSWERING = "<|im_start|>certainty<|im_end|>", "<|im_start|>assistant\n"
INVOCATIONS = {"certainty": APPENDED, "generation-prompt": ANSWERING, "mild": APPENDED}
KINDS = ("mild", "generation-prompt", "lora", "")
"""aLoRAs invoked by what is appended and by the generation prompt, a plain LoRA, and the base model."""


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
    """Packed where the processor can; ``float32 plain`` is not."""
    torch.set_num_threads(1)
    dtype, _, layout = request.param.partition(" ")
    return load_base_model(demo_model_directory, dtype=dtype, pack=layout != "plain")


@dataclass(frozen=True, slots=True)
class Served:
    """An answer of ours.

    Attributes:
        prompt: what PEFT must be given to be asked the same.
        logits: ``[answer tokens, vocabulary]``.
    """

    prompt: TokenIds
    invocation_start: int | None
    tokens: TokenIds
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Expected:
    """What stock PEFT says to the same prompt.

    Attributes:
        logits: in fp32, from ``generate``.
        at_once: in fp32, from one pass over prompt and answer.
        exact: in float64, from one pass.
    """

    tokens: TokenIds
    logits: torch.Tensor
    at_once: torch.Tensor
    exact: torch.Tensor


Asked = tuple[TokenIds, int | None]
"""A prompt, and where its invocation starts."""


@pytest.fixture(scope="module")
def pefts(demo_model_directory: Path, adapters: Path) -> Callable[[str, tuple[Asked, ...]], list[Expected]]:
    """Asks stock PEFT, once whatever the number of tests that compare with it."""

    @cache
    def ask(adapter: str, asked: tuple[Asked, ...]) -> list[Expected]:
        path = adapters / adapter if adapter else None
        stock, exact = (load_peft(demo_model_directory, path, dtype) for dtype in (torch.float32, torch.float64))
        answers = []
        for prompt, start in asked:
            said = greedy(stock, prompt, ANSWER_TOKENS)
            at_once, in_float64 = (forced_logits(model, prompt, said.tokens, start) for model in (stock, exact))
            assert in_float64.dtype == torch.float64
            answers.append(Expected(said.tokens, said.logits, at_once, in_float64))
        return answers

    return ask


async def _prefilled(stack: Stack, question: str) -> PrefillResult:
    return await stack.prefill(Prompt(messages=(ChatMessage("user", question),)))


def _prompt(prefilled: PrefillResult, stack: Stack, adapter: str) -> tuple[int, ...]:
    """What PEFT must be given to be asked the same."""
    handle = prefilled.handle
    listed = {info.name: info for info in stack.adapters.list_adapters()}
    if INVOCATIONS.get(adapter) == APPENDED:
        return handle.prefix_tokens + listed[adapter].invocation_tokens
    return handle.prefix_tokens + handle.generation_prompt_tokens


async def _answers(model: BaseModel, adapters: Path, adapter: str) -> list[Served]:
    """To each of the questions."""
    answers = []
    async with open_stack(model, MemoryStore(), adapters) as stack:
        for question in QUESTIONS:
            prefilled = await _prefilled(stack, question)
            answer, logits = await generate_with_logits(stack, prefilled.handle, adapter, max_tokens=ANSWER_TOKENS)
            prompt, start = _prompt(prefilled, stack, adapter), answer.started.invocation_start
            answers.append(Served(prompt, start, answer.tokens, logits))
    return answers


def _asked(answers: Sequence[Served]) -> tuple[Asked, ...]:
    return tuple((answer.prompt, answer.invocation_start) for answer in answers)


@pytest.mark.parametrize("model", ["float32 plain"], indirect=True)
@pytest.mark.parametrize("adapter", KINDS)
async def test_plain_weights_give_pefts_tokens_and_its_exact_logits(
    model: BaseModel, adapters: Path, pefts: Callable[[str, tuple[Asked, ...]], list[Expected]], adapter: str
) -> None:
    answers = await _answers(model, adapters, adapter)
    for answer, expected in zip(answers, pefts(adapter, _asked(answers)), strict=True):
        assert answer.tokens == expected.tokens
        assert _distance(answer.logits, expected) < ROUNDING


@pytest.mark.parametrize(
    ("model", "adapter"),
    [*(("float32", kind) for kind in ("certainty", *KINDS)), ("float32 plain", "certainty")],
    indirect=["model"],
)
async def test_rounding_is_of_the_size_of_pefts_own(
    model: BaseModel,
    adapters: Path,
    pefts: Callable[[str, tuple[Asked, ...]], list[Expected]],
    adapter: str,
    record_property: Callable[[str, object], None],
) -> None:
    answers = await _answers(model, adapters, adapter)
    said = pefts(adapter, _asked(answers))
    assert [answer.tokens for answer in answers] == [expected.tokens for expected in said]
    ours = max(_distance(answer.logits, expected) for answer, expected in zip(answers, said, strict=True))
    theirs = max(_distance(logits, expected) for expected in said for logits in (expected.logits, expected.at_once))
    record_property("from float64", f"ours {ours:.3e}, PEFT's {theirs:.3e}")
    assert ours <= TIMES_PEFTS * theirs


def _distance(logits: torch.Tensor, expected: Expected) -> float:
    return float((logits - expected.exact).abs().max())


@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("adapter", ["certainty", "generation-prompt", "lora", ""])
async def test_answers_in_bf16_are_right(
    model: BaseModel, demo_model_directory: Path, adapters: Path, adapter: str
) -> None:
    peft = load_peft(demo_model_directory, adapters / adapter if adapter else None)
    for answer in await _answers(model, adapters, adapter):
        assert largest_gap(peft, answer.prompt, answer.tokens, answer.invocation_start) <= TAU


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
        gaps.append(largest_gap(exact, prompt, answer, len(prefix) if adapter else None))
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

        monkeypatch.setattr(plan_module, "place_invocation", early)
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
            gaps.append(largest_gap(peft, prompt, answer.tokens, start))
    record_property("gaps", str(gaps))
    assert max(gaps) > TAU, gaps


def _overwrite_resident_kv(stack: Stack, victim: PrefillResult, source: PrefillResult) -> None:
    """Put the source conversation's last tokens' KV where the victim's lies; both share their system prompt."""
    prefixes = []
    for prefilled in (victim, source):
        chain = stack.core.names.chain(prefilled.handle.prefix_tokens)
        prefixes.append(stack.core.cache.acquire(chain, len(chain)))
    into, out_of = (prefix.slices[-1] for prefix in prefixes)
    assert into.segment is not out_of.segment
    count = min(into.tokens, out_of.tokens)
    into.segment.data[:, :, :, into.offset + into.tokens - count : into.offset + into.tokens] = out_of.segment.data[
        :, :, :, out_of.offset + out_of.tokens - count : out_of.offset + out_of.tokens
    ]
    for prefix in prefixes:
        stack.core.cache.release(prefix)
