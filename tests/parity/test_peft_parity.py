"""What is served equals stock PEFT: token for token in fp32 for every served family, and all logits within 1e-4."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from alora_serve.engine.core import CoreOptions
from alora_serve.engine.stepper import EngineLimits
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import Prompt
from in_process import MemoryStore, open_stack
from recorded_logits import generate_with_logits
from tiny_models import FAMILIES, WINDOW, peft_generate, save_adapter, save_model

GUARD = (258, 10, 258)
TARGETS = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
PROMPT_TOKENS = 75  # over three windows of 24, not a multiple of the block
WINDOWED = ("gemma2", "phi3", "qwen2")
MIXED_TOKENS = 80
LIKELY_TOKENS = 20


def _answer_tokens(family: str) -> int:
    """Where layers have windows, so many that the last tokens' windows begin after the prefix and the invocation."""
    return WINDOW + 6 if family in WINDOWED else 12


def _text_tokens(seed: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, 256, (count,), generator=generator).tolist())


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(family) / family, FAMILIES[family]())


@pytest.fixture(scope="module")
def adapters(family: str, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    targets = TARGETS.get(family, ["q_proj", "k_proj", "v_proj"])
    aloras: dict[str, dict[str, object]] = {
        "plain-guard": {"target_modules": targets},
        "rslora": {"target_modules": targets, "use_rslora": True},
        "all-linear": {"target_modules": "all-linear", "lora_alpha": 5},
        "patterns": {"target_modules": targets, "rank_pattern": {targets[0]: 3}, "alpha_pattern": {targets[-1]: 7}},
        "one-layer": {"target_modules": targets, "layers_to_transform": [1]},
    }
    for seed, (name, settings) in enumerate(aloras.items()):
        save_adapter(model_directory, root / name, seed=seed, alora_invocation_tokens=list(GUARD), **settings)
    save_adapter(model_directory, root / "lora", seed=9, target_modules=targets)
    return root


@pytest.fixture(scope="module")
def model(model_directory: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(model_directory, dtype="float32")


@pytest.mark.parametrize("adapter", ["plain-guard", "rslora", "all-linear", "patterns", "one-layer", "lora", ""])
async def test_every_kind_of_adapter_gives_pefts_tokens_and_logits(
    model: BaseModel, family: str, model_directory: Path, adapters: Path, adapter: str
) -> None:
    conversation = _text_tokens(seed=1, count=PROMPT_TOKENS)
    prompt = conversation if adapter in ("", "lora") else conversation + GUARD
    count = _answer_tokens(family)
    reference = peft_generate(model_directory, adapters / adapter if adapter else None, prompt, count)
    # Small steps and blocks: the prompt is computed in chunks and its prefix is cut into several blocks and a tail.
    options = CoreOptions(block_tokens=16, limits=EngineLimits(max_step_tokens=32))
    async with open_stack(model, MemoryStore(), adapters, options=options) as stack:
        prefilled = await stack.prefill(Prompt(token_ids=conversation))
        answer, logits = await generate_with_logits(
            stack, prefilled.handle, adapter, max_tokens=count, top_logprobs=LIKELY_TOKENS
        )
    assert answer.tokens == reference.tokens
    torch.testing.assert_close(logits, reference.logits, rtol=0, atol=1e-4)
    logprobs = torch.log_softmax(reference.logits, dim=-1)
    assert torch.tensor(answer.logprobs) == pytest.approx(logprobs[range(count), list(reference.tokens)], abs=1e-4)
    for chunk, expected in zip(answer.chunks, logprobs, strict=True):
        [top] = chunk.top_logprobs
        assert [token.logprob for token in top] == pytest.approx(expected.topk(LIKELY_TOKENS).values.tolist(), abs=1e-4)
        assert all(abs(token.logprob - float(expected[token.token_id])) < 1e-4 for token in top)
    if adapter not in ("", "lora"):
        assert answer.finished.usage.cached_tokens == PROMPT_TOKENS
        assert answer.finished.usage.computed_tokens == len(GUARD)


async def test_adapters_change_what_is_said(model: BaseModel, model_directory: Path, adapters: Path) -> None:
    """Guards the suite itself: if the adapters did nothing, every comparison above would pass without them."""
    conversation = _text_tokens(seed=1, count=PROMPT_TOKENS)
    base = peft_generate(model_directory, None, conversation + GUARD, 1)
    for name in ("plain-guard", "rslora", "all-linear", "patterns", "one-layer"):
        adapted = peft_generate(model_directory, adapters / name, conversation + GUARD, 1)
        assert (adapted.logits[0] - base.logits[0]).abs().max() > 1e-2, name


async def test_a_mixed_batch_equals_solo_runs(model: BaseModel, adapters: Path) -> None:
    requests = [
        ("plain-guard", 1, 75),
        ("rslora", 1, 75),
        ("", 1, 75),
        ("lora", 2, 33),
        ("all-linear", 3, 50),
        ("plain-guard", 4, 17),
    ]
    options = CoreOptions(block_tokens=16, limits=EngineLimits(max_step_tokens=32))
    async with open_stack(model, MemoryStore(), adapters, options=options) as stack:
        handles = [
            (await stack.prefill(Prompt(token_ids=_text_tokens(seed, count)))).handle for _, seed, count in requests
        ]
        pairs = list(zip(handles, [name for name, _, _ in requests], strict=True))
        # Long enough that the first is still running when the last has joined, on a busy machine too.
        solo = [await stack.generate(handle, name, max_tokens=MIXED_TOKENS) for handle, name in pairs]
        mixed = await asyncio.gather(*(stack.generate(handle, name, max_tokens=MIXED_TOKENS) for handle, name in pairs))
        assert stack.metrics.counts["peak running"] == len(requests)
    assert [answer.tokens for answer in mixed] == [answer.tokens for answer in solo]
