"""The same split gives the same bits, whichever way the KV went: kept in the process, through LMDB, through Valkey."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from alora_serve.engine.core import CoreOptions
from alora_serve.engine.stepper import EngineLimits
from alora_serve.kv.store import KVStore
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import Prompt, TokenIds
from in_process import MemoryStore, open_stack
from recorded_logits import generate_with_logits
from tiny_models import FAMILIES, WINDOW, save_adapter, save_model

GUARD = (258, 10, 258)
TOKENS = 3 * WINDOW + 3
ANSWER_TOKENS = 10
TARGETS = {"gpt2": ["c_attn"]}
OPTIONS = CoreOptions(block_tokens=16, limits=EngineLimits(max_step_tokens=32))


def _text(seed: int) -> TokenIds:
    return tuple(torch.randint(1, 256, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(family), FAMILIES[family]())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, model_directory: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(model_directory, dtype=request.param)


@pytest.fixture(scope="module")
def adapters(family: str, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    targets = TARGETS.get(family, ["q_proj", "k_proj", "v_proj"])
    save_adapter(model_directory, root / "guard", seed=0, target_modules=targets, alora_invocation_tokens=list(GUARD))
    save_adapter(model_directory, root / "lora", seed=1, target_modules=targets)
    return root


async def test_a_worker_that_fetches_gives_the_bits_of_one_that_has_it_resident(
    model: BaseModel, adapters: Path, make_store: Callable[[], KVStore]
) -> None:
    """Resident here means what it does in one process: computed in chunks, never stored and fetched."""
    with closing(make_store()) as store:
        async with open_stack(model, store, adapters, options=OPTIONS) as prefill:
            handle = (await prefill.prefill(Prompt(token_ids=_text(1)))).handle
            resident = {
                adapter: await generate_with_logits(prefill, handle, adapter, max_tokens=ANSWER_TOKENS)
                for adapter in ("guard", "lora")
            }
    for adapter, (expected, expected_logits) in resident.items():
        with closing(make_store()) as store:
            async with open_stack(model, store, adapters, options=OPTIONS) as cold:
                answer, logits = await generate_with_logits(cold, handle, adapter, max_tokens=ANSWER_TOKENS)
        assert torch.equal(logits, expected_logits)
        assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
        usage = answer.finished.usage
        if adapter == "guard":
            assert (usage.fetched_tokens, usage.computed_tokens) == (TOKENS, len(GUARD))
            assert usage.fetched_bytes == TOKENS * model.layout.bytes_per_token
            assert expected.finished.usage.fetched_bytes == 0
        else:
            assert (usage.fetched_bytes, usage.computed_tokens) == (0, TOKENS)


async def test_a_base_turn_fetched_or_resident_gives_the_same_bits(
    model: BaseModel, make_store: Callable[[], KVStore]
) -> None:
    with closing(make_store()) as store:
        async with open_stack(model, store, options=OPTIONS) as prefill:
            handle = (await prefill.prefill(Prompt(token_ids=_text(2)))).handle
    async with open_stack(model, MemoryStore(), options=OPTIONS) as alone:
        own_handle = (await alone.prefill(Prompt(token_ids=_text(2)))).handle
        expected, expected_logits = await generate_with_logits(alone, own_handle, max_tokens=ANSWER_TOKENS)
    with closing(make_store()) as store:
        async with open_stack(model, store, options=OPTIONS) as cold:
            answer, logits = await generate_with_logits(cold, handle, max_tokens=ANSWER_TOKENS)
    assert torch.equal(logits, expected_logits)
    assert answer.tokens == expected.tokens
    # The last token of the prompt is run again: its logits choose the first of the answer.
    assert (answer.finished.usage.fetched_tokens, answer.finished.usage.computed_tokens) == (TOKENS - 1, 1)


async def test_a_second_prefill_service_fetches_instead_of_recomputing(
    model: BaseModel, make_store: Callable[[], KVStore]
) -> None:
    with closing(make_store()) as store:
        async with open_stack(model, store, options=OPTIONS) as first:
            computed = (await first.prefill(Prompt(token_ids=_text(3)))).usage
    with closing(make_store()) as store:
        async with open_stack(model, store, options=OPTIONS) as second:
            fetched = (await second.prefill(Prompt(token_ids=_text(3)))).usage
            assert second.metrics.counts["steps"] == 0
    assert (computed.computed_tokens, computed.fetched_tokens) == (TOKENS, 0)
    assert (fetched.computed_tokens, fetched.fetched_tokens) == (0, TOKENS)
    assert fetched.fetched_bytes == computed.stored_bytes == TOKENS * model.layout.bytes_per_token


async def test_two_workers_that_recompute_the_same_rest_give_the_same_bits(model: BaseModel, adapters: Path) -> None:
    logits = []
    for _ in range(2):
        with closing(MemoryStore()) as store:
            async with open_stack(model, store, adapters, options=OPTIONS) as prefill:
                handle = (await prefill.prefill(Prompt(token_ids=_text(4)))).handle
                chain = prefill.core.names.chain(_text(4))
                gone = prefill.core.blocks.blocks(chain, 32)
                store.values = {
                    key: value
                    for key, value in store.values.items()
                    if key not in {spec.key for block in gone for spec in prefill.core.blocks._specs(block)}
                }
            async with open_stack(model, store, adapters, options=OPTIONS) as cold:
                answer, said = await generate_with_logits(cold, handle, "guard", max_tokens=ANSWER_TOKENS)
            assert answer.finished.usage.fetched_tokens == 32
            assert answer.finished.usage.computed_tokens == TOKENS - 32 + len(GUARD)
            logits.append(said)
    assert torch.equal(*logits)
