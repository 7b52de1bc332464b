"""The arithmetic of a plan: memory from a model's shape, processes and price from measured rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from alora_serve.kv.layout import ITEM_BYTES
from alora_serve.model.shape import ModelShape

STORE_HEADROOM: Final = 1.25
"""A store's memory over the KV in it: records' heads, tails that full blocks replaced, buffers of the server."""
BUSY_SHARE: Final = 0.7
"""How busy a process is planned to be: queues grow without bound towards 1."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a deployment.

    Attributes:
        conversations: those whose KV should stay in the store.
        conversation_tokens: of one, when its adapters are asked.
        turn_tokens: of these, new since they were asked before: what base prefill computes.
        adapters: asked about each turn, in one fan-out.
        adapter_rank: of each, on queries, keys and values.
        invocation_tokens: computed for each call before it can answer.
        answer_tokens: of an adapter.
        calls_per_second: adapter calls, ``adapters`` a turn.
    """

    conversations: int
    conversation_tokens: int
    turn_tokens: int
    adapters: int
    adapter_rank: int
    invocation_tokens: int
    answer_tokens: int
    calls_per_second: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What one process does with this model on its machine.

    Attributes:
        prefill_tokens_per_second: prompt tokens through the model.
        step_seconds: a decode step of ``step_sequences`` sequences, each with an adapter.
        fetch_bytes_per_second: KV from the store into a worker.
        defaults: names of those that nobody gave, and that another machine has: :data:`REFERENCE_MACHINE`.
    """

    prefill_tokens_per_second: float
    step_seconds: float
    step_sequences: int
    fetch_bytes_per_second: float
    defaults: tuple[str, ...] = ()


REFERENCE_MACHINE: Final = "two cores of an AMD EPYC"
REFERENCE_RATES: Final = Rates(
    prefill_tokens_per_second=360.0, step_seconds=0.128, step_sequences=16, fetch_bytes_per_second=2.6e9
)
"""Those of the demo model in float32 there, and of its LMDB: docs/performance.md."""


def rates_from(
    prefill_rate: float | None, step_seconds: float | None, step_sequences: int, fetch_rate: float | None, *, demo: bool
) -> Rates | None:
    """The rates that were given, and the reference's where they may stand in: for the store's, and for the demo model.

    ``demo``: it is the demo model in float32. None where a rate of the model is not known.
    """
    if not demo and (prefill_rate is None or step_seconds is None):
        return None
    given = {
        "prefill_tokens_per_second": prefill_rate,
        "step_seconds": step_seconds,
        "fetch_bytes_per_second": fetch_rate,
    }
    measured = {name: rate for name, rate in given.items() if rate is not None}
    defaults = tuple(name for name in given if name not in measured)
    return replace(REFERENCE_RATES, **measured, step_sequences=step_sequences, defaults=defaults)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes.

    Attributes:
        kv_per_token: by dtype.
        block_tokens: tokens of a stored block.
        conversation: KV of one conversation.
        store: for all conversations, with headroom: ``maxmemory`` or ``store_budget_bytes``.
        weights: of the model in each process that computes; None where the directory holds none.
        resident_conversations: that fit ``prefix_cache_bytes`` of a process.
        adapter: one in a worker's memory; a worker has a second copy of those that ran lately.
    """

    kv_per_token: dict[str, int]
    block_tokens: int
    conversation: int
    store: int
    weights: int | None
    resident_conversations: int
    adapter: int


@dataclass(frozen=True, slots=True)
class Effort:
    """What adapter calls take one way: with the conversation's KV reused, or recomputed by each call.

    Attributes:
        prefill_seconds: a base prefill's, a call.
        worker_seconds: a decode worker's, a call, in a full batch.
        base_prefills: for the load, at :data:`BUSY_SHARE`.
        workers: likewise.
        price_per_1000_calls: of all these seconds.
    """

    prefill_seconds: float
    worker_seconds: float
    base_prefills: int
    workers: int
    price_per_1000_calls: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it; without rates there is no effort."""

    model: str
    parameters: int | None
    dtype: str
    load: Load
    memory: Memory
    rates: Rates | None
    reused: Effort | None
    recomputed: Effort | None


def make_plan(
    shape: ModelShape, *, dtype: str, load: Load, rates: Rates | None, hour_price: float, prefix_cache_bytes: int
) -> Plan:
    """Plan for a model.

    Args:
        dtype: ``float32`` or ``bfloat16``.
        hour_price: of one process, with the cores or the GPU that it computes on.
        prefix_cache_bytes: the setting of that name.

    Raises:
        ConfigError: ``config.json`` lacks a field.
    """
    memory = _memory(shape, dtype, load, prefix_cache_bytes)
    return Plan(
        model=shape.name,
        parameters=shape.parameters,
        dtype=dtype,
        load=load,
        memory=memory,
        rates=rates,
        reused=None if rates is None else _reused(load, rates, memory.conversation, hour_price),
        recomputed=None if rates is None else _recomputed(load, rates, hour_price),
    )


def _memory(shape: ModelShape, dtype: str, load: Load, prefix_cache_bytes: int) -> Memory:
    layout = shape.kv_layout(dtype)
    conversation = load.conversation_tokens * layout.bytes_per_token
    return Memory(
        kv_per_token={name: shape.kv_layout(name).bytes_per_token for name in ("bfloat16", "float32")},
        block_tokens=layout.default_block_tokens(),
        conversation=conversation,
        store=math.ceil(load.conversations * conversation * STORE_HEADROOM),
        weights=None if shape.parameters is None else shape.parameters * ITEM_BYTES[dtype],
        resident_conversations=prefix_cache_bytes // conversation,
        adapter=shape.adapter_bytes(load.adapter_rank),
    )


def _reused(load: Load, rates: Rates, conversation_bytes: int, hour_price: float) -> Effort:
    """The new tokens of a turn are computed once and its KV is fetched once, whatever the number of its adapters."""
    return _effort(
        load,
        prefill_seconds=load.turn_tokens / rates.prefill_tokens_per_second / load.adapters,
        worker_seconds=conversation_bytes / rates.fetch_bytes_per_second / load.adapters + _answer_seconds(load, rates),
        hour_price=hour_price,
    )


def _recomputed(load: Load, rates: Rates, hour_price: float) -> Effort:
    """Plain LoRA: every call computes its whole prompt, on the worker."""
    prompt_seconds = load.conversation_tokens / rates.prefill_tokens_per_second
    return _effort(
        load,
        prefill_seconds=0.0,
        worker_seconds=prompt_seconds + _answer_seconds(load, rates),
        hour_price=hour_price,
    )


def _answer_seconds(load: Load, rates: Rates) -> float:
    return (
        load.invocation_tokens / rates.prefill_tokens_per_second
        + load.answer_tokens * rates.step_seconds / rates.step_sequences
    )


def _effort(load: Load, *, prefill_seconds: float, worker_seconds: float, hour_price: float) -> Effort:
    return Effort(
        prefill_seconds=prefill_seconds,
        worker_seconds=worker_seconds,
        base_prefills=_processes(load.calls_per_second * prefill_seconds),
        workers=_processes(load.calls_per_second * worker_seconds),
        price_per_1000_calls=1000 * (prefill_seconds + worker_seconds) * hour_price / 3600,
    )


def _processes(busy_seconds_per_second: float) -> int:
    return math.ceil(busy_seconds_per_second / BUSY_SHARE)
