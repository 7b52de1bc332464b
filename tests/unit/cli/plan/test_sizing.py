"""A plan's numbers, each against one worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from alora_serve.cli.plan.sizing import Effort, Load, Plan, Rates, make_plan
from alora_serve.model.shape import ModelShape

LLAMA_8B = ModelShape(
    name="Llama-3.1-8B",
    config={"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
    parameters=8_000_000_000,
)
LOAD = Load(
    conversations=100,
    conversation_tokens=1000,
    turn_tokens=300,
    adapters=5,
    adapter_rank=32,
    invocation_tokens=10,
    answer_tokens=20,
    calls_per_second=10.0,
)
RATES = Rates(
    prefill_tokens_per_second=100.0, step_seconds=0.5, step_sequences=10, fetch_bytes_per_second=131_072_000.0
)


def plan(load: Load = LOAD, rates: Rates | None = RATES) -> Plan:
    return make_plan(LLAMA_8B, dtype="bfloat16", load=load, rates=rates, hour_price=7.2, prefix_cache_bytes=2**30)


def test_memory_is_layers_times_heads_times_tokens() -> None:
    memory = plan().memory
    assert memory.kv_per_token == {"bfloat16": 32 * 2 * 8 * 128 * 2, "float32": 32 * 2 * 8 * 128 * 4}
    assert memory.conversation == 131_072_000
    assert memory.store == 100 * 131_072_000 * 5 // 4
    assert memory.weights == 16_000_000_000
    assert memory.block_tokens == 16
    # Of each layer three matrices of 32 x 4096, one of 4096 x 32 and two of 1024 x 32, in float32.
    assert memory.adapter == 32 * 32 * (3 * 4096 + 4096 + 2 * 1024) * 4
    assert memory.resident_conversations == 8  # 8.19 of 131 MB in 2**30 bytes


def test_a_call_takes_its_share_of_the_turn_and_its_own_answer() -> None:
    reused = plan().reused
    assert reused is not None
    assert reused.prefill_seconds == pytest.approx(300 / 100 / 5)
    # One second's fetch shared by five, ten tokens of invocation, twenty steps shared by ten sequences.
    assert reused.worker_seconds == pytest.approx(1 / 5 + 10 / 100 + 20 * 0.5 / 10)
    assert (reused.base_prefills, reused.workers) == (9, 19)  # 10 a second x 0.6 s / 0.7, and 10 x 1.3 s / 0.7
    assert reused.price_per_1000_calls == pytest.approx(1000 * 1.9 * 7.2 / 3600)


def test_recomputing_takes_the_whole_prompt_on_the_worker_each_time() -> None:
    assert plan().recomputed == Effort(
        prefill_seconds=0.0,
        worker_seconds=pytest.approx(1000 / 100 + 10 / 100 + 20 * 0.5 / 10),
        base_prefills=0,
        workers=159,
        price_per_1000_calls=pytest.approx(1000 * 11.1 * 7.2 / 3600),
    )


def test_one_adapter_on_a_conversation_that_is_all_new_still_computes_it_once() -> None:
    made = plan(dataclasses.replace(LOAD, adapters=1, turn_tokens=1000))
    assert made.reused is not None
    assert made.recomputed is not None
    # All that reuse adds is the fetch.
    gap = made.reused.prefill_seconds + made.reused.worker_seconds - made.recomputed.worker_seconds
    assert gap == pytest.approx(1.0)


def test_without_rates_there_is_no_effort() -> None:
    made = plan(rates=None)
    assert (made.reused, made.recomputed) == (None, None)
    assert made.memory == plan().memory
