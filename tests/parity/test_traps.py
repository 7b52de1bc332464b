"""Each trap of DESIGN section 2: the guard holds, and without it the answer is another.

Where a test removes a guard it says which wrong value comes of it. "Another" is measured as the largest difference of
the logits that choose the first token, against stock PEFT on the same prompt; with the guard it is below 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alora_serve.adapters.activation import place_invocation
from alora_serve.engine import decoder as decoder_module
from alora_serve.engine.core import CoreOptions
from alora_serve.engine.lora_rows import LoraRows
from alora_serve.kv.keys import part_key
from alora_serve.kv.record import RecordSpec, open_record
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import ChatMessage, PrefixHandle, Prompt, PromptKind, Resume
from in_process import MemoryStore, Stack, open_stack
from tiny_models import FAMILIES, VOCABULARY, peft_generate, save_adapter, save_model

GUARD = (258, 10, 258)
GENERATION_PROMPT_TEXT = "<|start|>assistant\n"
OPTIONS = CoreOptions(block_tokens=16)
CONVERSATION = tuple(range(1, 76))
QUESTION = Prompt(messages=(ChatMessage("user", "Is the sea deep, and why is it salt?"),))


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny-llama", FAMILIES["llama"]())


@pytest.fixture(scope="module")
def model(model_directory: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(model_directory, dtype="float32")


@pytest.fixture(scope="module")
def adapters(model: BaseModel, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    answer = model.tokenizer.render((ChatMessage("user", "x"),)).generation_prompt_tokens
    invocations = {"guard": GUARD, "answer": answer, "pair": (97, 98), "edge": (256, 97)}
    for seed, (name, invocation) in enumerate(invocations.items()):
        settings = {"target_modules": "all-linear", "alora_invocation_tokens": list(invocation)}
        save_adapter(model_directory, root / name, seed=seed, **settings)
    save_adapter(model_directory, root / "plain", seed=9, target_modules="all-linear")
    return root


async def _first_logprobs(stack: Stack, handle: PrefixHandle, adapter: str) -> torch.Tensor:
    """Log-probabilities of a spread of tokens at the first position: each asked for by the bias that forces it."""
    asked = range(0, VOCABULARY, 20)
    answers = [await stack.generate(handle, adapter, max_tokens=1, logit_bias={token: 100.0}) for token in asked]
    return torch.tensor([answer.logprobs[0] for answer in answers])


def _reference(model_directory: Path, adapter: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    logits = peft_generate(model_directory, adapter, prompt, 1).logits[0]
    return torch.log_softmax(logits, dim=-1)[list(range(0, VOCABULARY, 20))]


async def _error(stack: Stack, model_directory: Path, adapters: Path, handle: PrefixHandle, adapter: str) -> float:
    invocation = {info.name: info for info in stack.adapters.list_adapters()}[adapter].invocation_tokens
    served = await _first_logprobs(stack, handle, adapter)
    expected = _reference(model_directory, adapters / adapter, handle.prefix_tokens + invocation)
    return float((served - expected).abs().max())


@pytest.mark.parametrize("overlap_tokens", [1, 2])
async def test_a_cache_may_not_overlap_the_invocation_by_even_one_token(
    model: BaseModel, model_directory: Path, adapters: Path, overlap_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The exact prompt, invocation included, is prefilled as base KV, as a base turn on the same tokens would do.
    prompt = Prompt(token_ids=CONVERSATION + GUARD)
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(prompt)).handle
        served = await _first_logprobs(stack, handle, "guard")
        expected = _reference(model_directory, adapters / "guard", CONVERSATION + GUARD)
        assert (served - expected).abs().max() < 1e-4

        def later(**arguments: object):  # type: ignore[no-untyped-def]
            placed = place_invocation(**arguments)  # type: ignore[arg-type]
            return replace(placed, invocation_start=(placed.invocation_start or 0) + overlap_tokens)

        monkeypatch.setattr(decoder_module, "place_invocation", later)
        wrong = await _first_logprobs(stack, handle, "guard")
        # Base KV where adapter KV belongs: no error anywhere, other logits.
        assert (wrong - expected).abs().max() > 1e-2


async def test_the_base_service_does_not_cache_past_an_invocation_that_is_the_generation_prompt(
    model: BaseModel, model_directory: Path, adapters: Path
) -> None:
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        prefilled = await stack.prefill(QUESTION)
        handle = prefilled.handle
        assert model.tokenizer.decode(handle.prefix_tokens).endswith("salt?\n")
        assert prefilled.usage.prompt_tokens == len(handle.prefix_tokens)
        answer = await stack.generate(handle, "answer")
        assert answer.started.invocation_start == len(handle.prefix_tokens)
        assert answer.finished.usage.cached_tokens == len(handle.prefix_tokens)
        assert await _error(stack, model_directory, adapters, handle, "answer") < 1e-4
    prompt = handle.prefix_tokens + handle.generation_prompt_tokens
    assert answer.tokens == peft_generate(model_directory, adapters / "answer", prompt, 16).tokens


async def test_a_prompt_without_the_invocation_gets_it_appended_and_is_never_a_silent_base_answer(
    model: BaseModel, model_directory: Path, adapters: Path
) -> None:
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        answer = await stack.generate(handle, "guard")
        base = await stack.generate(handle)
    assert answer.started.invocation_start == len(CONVERSATION)
    assert answer.started.prompt_tokens == len(CONVERSATION) + len(GUARD)
    assert answer.tokens == peft_generate(model_directory, adapters / "guard", CONVERSATION + GUARD, 16).tokens
    assert answer.tokens != base.tokens  # what PEFT itself answers, with a warning


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ((5, 6, 97, 98, 98), 2),  # `a b b`: a scan anchored at the end misses it and answers with base weights
        ((97, 98, 7, 8, 97, 98, 9), 4),  # the last match counts: the first would adapt four tokens too many
        ((97, 97, 98, 3), 1),  # `a a b`: a scan that skips past the partial match misses it
    ],
)
async def test_the_last_match_anywhere_in_a_raw_prompt_turns_the_adapter_on(
    model: BaseModel, model_directory: Path, adapters: Path, tokens: tuple[int, ...], start: int
) -> None:
    prompt = CONVERSATION + tokens
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=prompt))).handle
        answer = await stack.generate(handle, "pair")
        assert answer.started.invocation_start == len(CONVERSATION) + start
        assert answer.finished.usage.cached_tokens == len(CONVERSATION) + start  # clamped, part of a block dropped
    assert answer.tokens == peft_generate(model_directory, adapters / "pair", prompt, 16).tokens


async def test_decode_steps_keep_the_adapter_on(
    model: BaseModel, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        right = await stack.generate(handle, "guard")
        set_rows = LoraRows.set_rows

        def only_prompts(self: LoraRows, rows):  # type: ignore[no-untyped-def]
            set_rows(self, [(adapter, where) for adapter, where in rows if where.stop - where.start > 1])

        monkeypatch.setattr(LoraRows, "set_rows", only_prompts)
        forgetful = await stack.generate(handle, "guard")
    assert forgetful.logprobs[0] == right.logprobs[0]
    assert forgetful.tokens != right.tokens  # the first token is right, the rest is the base model's


async def test_adapter_kv_reaches_neither_the_store_nor_a_base_turn(model: BaseModel, adapters: Path) -> None:
    store, clean_store = MemoryStore(), MemoryStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(QUESTION)).handle
        for name in ("guard", "answer", "plain", "pair"):
            await stack.generate(handle, name)
        served = await stack.generate(handle)
        continued = await stack.prefill(Prompt(handle=served.finished.handle, messages=QUESTION.messages))
    async with open_stack(model, clean_store, options=OPTIONS) as clean:
        expected = await clean.generate((await clean.prefill(QUESTION)).handle)
        await clean.prefill(Prompt(handle=expected.finished.handle, messages=QUESTION.messages))
    assert served.tokens == expected.tokens
    assert served.logprobs == expected.logprobs
    # Everything stored is what a deployment without adapters stored, bit for bit: nothing more and nothing else.
    assert store.values == clean_store.values
    assert continued.usage.cached_tokens >= len(served.finished.handle.prefix_tokens) - 1


async def test_an_adapter_that_computes_missing_base_kv_writes_back_base_kv(model: BaseModel, adapters: Path) -> None:
    clean, lossy = MemoryStore(), MemoryStore()
    async with open_stack(model, clean, options=OPTIONS) as prefill:
        handle = (await prefill.prefill(Prompt(token_ids=CONVERSATION))).handle
    async with open_stack(model, lossy, adapters, options=OPTIONS) as worker:
        await worker.generate(handle, "guard")
        await worker.core.drain()
        chain = worker.core.blocks.chain(CONVERSATION)
        for block in worker.core.blocks.blocks(chain, 0):
            spec = RecordSpec(part_key(block.name, 0), model.layout, range(model.layout.layers), block.tokens)
            mine = torch.frombuffer(bytearray(open_record(spec, lossy.values[spec.key])), dtype=torch.float32)
            theirs = torch.frombuffer(bytearray(open_record(spec, clean.values[spec.key])), dtype=torch.float32)
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert lossy.values.keys() == clean.values.keys()


async def test_generated_text_is_never_searched_for_the_invocation(
    model: BaseModel, model_directory: Path, adapters: Path
) -> None:
    # The bias makes the adapter say its own invocation; a worker that searched again on resume would move the boundary.
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        whole = await stack.generate(handle, "pair", max_tokens=12, logit_bias={97: 9.0, 98: 9.0})
        said = whole.tokens[:8]
        assert 97 in said
        assert 98 in said
        resume = Resume(said, whole.started.invocation_start, whole.started.adapter_digest)
        resumed = await stack.generate(handle, "pair", resume=resume, max_tokens=12, logit_bias={97: 9.0, 98: 9.0})
    assert resumed.started.invocation_start == whole.started.invocation_start == len(CONVERSATION)
    assert resumed.tokens == whole.tokens[8:]


async def test_an_invocation_across_the_prefixs_edge_clamps_what_is_cached(
    model: BaseModel, model_directory: Path, adapters: Path
) -> None:
    """The invocation's first token ends the prefix, its second begins the generation prompt."""
    store = MemoryStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as prefill:
        raw = (await prefill.prefill(Prompt(token_ids=(*CONVERSATION, 256)))).handle
        signer = prefill.prefiller._signer
    handle = signer.sign(replace(raw, kind=PromptKind.CONVERSATION, generation_prompt_tokens=(97, 5)))
    async with open_stack(model, store, adapters, options=OPTIONS) as worker:
        answer = await worker.generate(handle, "edge")
    assert answer.started.invocation_start == len(CONVERSATION)
    assert answer.finished.usage.cached_tokens == len(CONVERSATION)  # 76 tokens were stored: part of a block is dropped
    prompt = (*CONVERSATION, 256, 97, 5)
    assert answer.tokens == peft_generate(model_directory, adapters / "edge", prompt, 16).tokens


async def test_a_plain_lora_neither_reads_nor_writes_shared_kv(
    model: BaseModel, model_directory: Path, adapters: Path
) -> None:
    store = MemoryStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        before = dict(store.values)
        answer = await stack.generate(handle, "plain")
        await stack.core.drain()
    assert answer.finished.usage.cached_tokens == 0
    assert answer.finished.usage.computed_tokens == len(CONVERSATION)
    assert store.values == before
    assert answer.tokens == peft_generate(model_directory, adapters / "plain", CONVERSATION, 16).tokens


@pytest.mark.parametrize("adapter", ["guard", "plain", ""])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("delivered", [1, 7, 15])
async def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(
    model: BaseModel, adapters: Path, adapter: str, temperature: float, delivered: int
) -> None:
    sampling = {"temperature": temperature, "seed": 7, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(QUESTION)).handle
        whole = await stack.generate(handle, adapter, **sampling)
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as other:
        resume = Resume(whole.tokens[:delivered], whole.started.invocation_start, whole.started.adapter_digest)
        resumed = await other.generate(handle, adapter, resume=resume, **sampling)
    assert resumed.tokens == whole.tokens[delivered:]
    assert resumed.finished.usage.generated_tokens == whole.finished.usage.generated_tokens
