"""On a GPU, fp32: the tokens of stock PEFT on the processor, through pinned copies, fused kernels and graphs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alora_serve.engine.core import CoreOptions
from alora_serve.engine.stepper import EngineLimits
from alora_serve.model import decode_replay
from alora_serve.model.device import open_device
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import Prompt
from in_process import MemoryStore, open_stack
from tiny_models import FAMILIES, peft_generate, save_adapter, save_model

pytestmark = pytest.mark.gpu

GUARD = (258, 10, 258)
PROMPT = tuple(torch.randint(1, 256, (75,), generator=torch.Generator().manual_seed(1)).tolist())
TOKENS = 24
OPTIONS = CoreOptions(block_tokens=16, limits=EngineLimits(max_step_tokens=32))


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3"])
def model_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gpu") / request.param, FAMILIES[request.param]())


@pytest.fixture(scope="module")
def adapters(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "k_proj", "v_proj"]
    for seed, name in enumerate(("one", "two")):
        save_adapter(
            model_directory, root / name, seed=seed, target_modules=targets, alora_invocation_tokens=list(GUARD)
        )
    save_adapter(model_directory, root / "plain", seed=9, target_modules=targets)
    return root


@pytest.fixture(scope="module")
def model(model_directory: Path) -> Iterator[BaseModel]:
    yield load_base_model(model_directory, dtype="float32", device=open_device("cuda"))
    torch.cuda.empty_cache()


async def test_a_batch_gives_the_tokens_of_peft(model: BaseModel, model_directory: Path, adapters: Path) -> None:
    expected = []
    for name in ("one", "two", "plain", ""):
        prompt = PROMPT + GUARD if name in ("one", "two") else PROMPT
        expected.append(peft_generate(model_directory, adapters / name if name else None, prompt, TOKENS).tokens)
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=PROMPT))).handle
        answers = await asyncio.gather(
            *(stack.generate(handle, name, max_tokens=TOKENS) for name in ("one", "two", "plain", ""))
        )
    assert [answer.tokens for answer in answers] == expected


async def test_a_worker_that_fetches_gives_the_logprobs_of_one_that_has_it_resident(
    model: BaseModel, adapters: Path
) -> None:
    store = MemoryStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=PROMPT))).handle
        resident = await stack.generate(handle, "one", max_tokens=TOKENS)
    async with open_stack(model, store, adapters, options=OPTIONS) as stack:
        fetched = await stack.generate(handle, "one", max_tokens=TOKENS)
    assert fetched.finished.usage.fetched_bytes > 0
    assert fetched.tokens == resident.tokens
    assert fetched.logprobs == resident.logprobs


async def test_decode_steps_are_replayed_as_graphs(
    model: BaseModel, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []
    record = decode_replay.record_graph
    monkeypatch.setattr(decode_replay, "record_graph", lambda compute: recorded.append(compute) or record(compute))
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=PROMPT))).handle
        await stack.generate(handle, "one", max_tokens=TOKENS)
    # Where transformers' code runs the model, every step is planned anew.
    assert len(recorded) == (model.lean is not None)
