"""What a service says about itself is what it measured and what it holds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from alora_serve.engine.core import STORE_THREADS, CoreOptions, ServingCore
from alora_serve.engine.prefiller import Prefiller
from alora_serve.handles import HandleSigner
from alora_serve.kv.fingerprints import STRIDE_TOKENS, PrefixFingerprints
from alora_serve.kv.store import Put, Sink, StoreKey
from alora_serve.model.host_copies import DirectCopies
from alora_serve.model.loader import BaseModel
from alora_serve.model.weights import WeightQuantization
from alora_serve.types import Prompt
from in_process import SECRET, CountingMetrics, MemoryStore, open_stack

OPTIONS = CoreOptions(block_tokens=16, tenant_salt=b"salt")
TOKENS = tuple(range(1, 251)) + tuple(range(1, 51))


async def test_a_fresh_service_knows_no_figure_and_holds_nothing(model: BaseModel) -> None:
    async with open_stack(model, MemoryStore(), options=OPTIONS) as stack:
        status = stack.core.status()
    assert (status.fetch_bytes_per_second, status.prefill_tokens_per_second, status.sequence_seconds) == (0, 0, 0)
    assert status.pending_prefill_tokens == 0
    assert not status.resident_prefixes.fingerprints


async def test_a_prefill_is_told_as_resident_under_the_names_routers_make(model: BaseModel, adapters: Path) -> None:
    store = MemoryStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=TOKENS))).handle
        computed = stack.core.status()
        await stack.generate(handle, "lora", max_tokens=2)
        assert stack.core.status().resident_prefixes == computed.resident_prefixes, "plain LoRA uses no base KV"
    expected = PrefixFingerprints(b"salt").of(TOKENS, model_digest=model.model_digest)
    assert len(TOKENS) // STRIDE_TOKENS == 1
    assert computed.resident_prefixes.fingerprints == {*expected}
    assert computed.prefill_tokens_per_second > 0
    assert computed.fetch_bytes_per_second == 0
    assert computed.sequence_seconds > 0

    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        await cold.generate(handle, "appended", max_tokens=4)
        fetched = cold.core.status()
    assert fetched.resident_prefixes.fingerprints == {*expected}
    assert fetched.fetch_bytes_per_second > 0
    assert fetched.sequence_seconds > 0


async def test_a_base_turn_is_told_with_its_answer(model: BaseModel) -> None:
    tokens = TOKENS[: STRIDE_TOKENS - 20]
    async with open_stack(model, MemoryStore(), options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=tokens))).handle
        assert not stack.core.status().resident_prefixes.fingerprints
        answer = await stack.generate(handle, max_tokens=40)
        told = stack.core.status().resident_prefixes.fingerprints
    whole = PrefixFingerprints(b"salt").of((*tokens, *answer.tokens), model_digest=model.model_digest)
    assert told == {*whole}


async def test_what_memory_had_no_room_for_is_not_told(model: BaseModel) -> None:
    room_for_one = CoreOptions(block_tokens=16, prefix_cache_bytes=450 * model.layout.bytes_per_token)
    async with open_stack(model, MemoryStore(), options=room_for_one) as stack:
        for first in (1, 2):
            await stack.prefill(Prompt(token_ids=(first, *TOKENS)))
        told = stack.core.status().resident_prefixes.fingerprints
    assert told == {*PrefixFingerprints(b"").of((2, *TOKENS), model_digest=model.model_digest)}


@dataclass
class SlowStore(MemoryStore):
    """Takes so long for each read."""

    seconds: float = 0.0

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        time.sleep(self.seconds)
        super().get_many(keys, sink, timeout_seconds=timeout_seconds)


@asynccontextmanager
async def deciding(model: BaseModel, store: MemoryStore) -> AsyncIterator[tuple[ServingCore, Prefiller]]:
    """A core that fetches only where that has been faster."""
    core = ServingCore(model, store, replace(OPTIONS, always_fetch=False), CountingMetrics())
    try:
        yield core, Prefiller(core, HandleSigner([SECRET], b"", 3600))
        await core.drain()
    finally:
        core.close()


# So fast and so slow that no machine, however busy, turns the comparison round.
@pytest.mark.parametrize(
    ("read_seconds", "prefill_rate", "decision"), [(0.05, 1e9, "compute"), (0.0, 1e-3, "fetch")], ids=["slow", "quick"]
)
async def test_a_conversation_is_fetched_from_a_quick_store_and_computed_again_beside_a_slow_one(
    model: BaseModel, read_seconds: float, prefill_rate: float, decision: str
) -> None:
    store = SlowStore(seconds=read_seconds)
    conversations = [(first, *TOKENS) for first in (1, 2)]
    async with deciding(model, store) as (_, prefiller):
        for tokens in conversations:
            await prefiller.prefill(Prompt(token_ids=tokens))
    async with deciding(model, store) as (cold, prefiller):
        first = (await prefiller.prefill(Prompt(token_ids=conversations[0]))).usage
        assert first.fetched_tokens == len(conversations[0]), "what nobody has measured favours fetching"
        cold.engine.rates.prefill_tokens_per_second = prefill_rate
        second = (await prefiller.prefill(Prompt(token_ids=conversations[1]))).usage
    computed = len(conversations[1]) if decision == "compute" else 0
    assert (second.computed_tokens, second.fetched_tokens) == (computed, len(conversations[1]) - computed)
    assert ("slower" in second.store_misses) == (decision == "compute")
    assert second.stored_bytes == 0, "the store has it"


@dataclass
class StuckStore(MemoryStore):
    """Writes wait until the gate is open."""

    gate: threading.Event = field(default_factory=threading.Event)
    reached: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        self.reached.release()
        assert self.gate.wait(60)
        super().put_many(puts, timeout_seconds=timeout_seconds)


async def test_a_fetch_waits_for_no_write(model: BaseModel) -> None:
    filled = MemoryStore()
    async with open_stack(model, filled, options=OPTIONS) as stack:
        await stack.prefill(Prompt(token_ids=TOKENS))
    store = StuckStore(filled.values)
    async with open_stack(model, store, options=OPTIONS) as cold:
        others = [
            asyncio.create_task(cold.prefill(Prompt(token_ids=(first, *TOKENS))))
            for first in range(2, 4 + STORE_THREADS)
        ]
        try:
            for _ in range(STORE_THREADS):
                assert await asyncio.to_thread(store.reached.acquire, timeout=30)
            chain = cold.core.names.chain(TOKENS, cold.core.tenants.of(""))
            loaded = await asyncio.wait_for(cold.core.load_prefix(chain, len(TOKENS)), timeout=20)
        finally:
            store.gate.set()
        cold.core.cache.release(loaded.prefix)
        await asyncio.gather(*others)
    assert loaded.fetched_tokens == len(TOKENS)


@pytest.mark.parametrize("weight_layout", ["packed", "plain"])
async def test_kv_is_shared_by_those_whose_weights_lie_alike(model: BaseModel, weight_layout: str) -> None:
    """Products of packed weights round otherwise. To a worker of the other kind such KV is a plain miss."""
    store, packed = MemoryStore(), replace(model, weight_layout="packed")
    async with open_stack(packed, store, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=TOKENS))).handle
    async with open_stack(replace(model, weight_layout=weight_layout), store, options=OPTIONS) as cold:
        usage = (await cold.generate(handle, max_tokens=2)).finished.usage
        shared = cold.core.storage_digest == handle.storage_digest
    assert shared == (weight_layout == "packed")
    # The last token of the prompt is run again: its logits choose the first of the answer.
    assert usage.fetched_tokens == (len(TOKENS) - 1 if shared else 0)


def test_kv_of_a_processor_and_of_a_gpu_is_not_shared_but_that_of_two_gpus_is(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alora_serve.engine.core.host_copies", lambda _: DirectCopies())  # there is no GPU to copy to

    def digest(device: str) -> bytes:
        core = ServingCore(replace(model, device=torch.device(device)), MemoryStore(), OPTIONS, CountingMetrics())
        core.close()
        return core.storage_digest

    assert digest("cpu") != digest("cuda:0") == digest("cuda:1")


def test_kv_of_rounded_weights_is_not_shared(model: BaseModel) -> None:
    """It is another model's, whatever the digest of the files says."""

    def digest(quantization: WeightQuantization) -> bytes:
        core = ServingCore(replace(model, weight_quantization=quantization), MemoryStore(), OPTIONS, CountingMetrics())
        core.close()
        return core.storage_digest

    assert digest("none") != digest("int8")
