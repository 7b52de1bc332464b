"""Writes wait in a queue that is bounded in time and memory, and hold what they read until they have read it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from alora_serve.engine.block_writer import PINNED_SHARE, BlockWriter, give_up
from alora_serve.engine.prefix_cache import MIN_SLACK_TOKENS, PrefixCache
from alora_serve.kv.blocks import BlockStore
from alora_serve.kv.keys import BlockChain, BlockHash, part_key
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.store import Put
from alora_serve.kv.transfer import StoreTiming
from alora_serve.model.kv_memory import Prefix
from faulty_store import FaultyStore
from in_process import CountingMetrics

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32")
TOKENS = 30
BLOCKS = 8
SEGMENT_BYTES = (TOKENS + MIN_SLACK_TOKENS) * LAYOUT.bytes_per_token
SIZE_BYTES = TOKENS * LAYOUT.bytes_per_token
PATIENT = StoreTiming(base_seconds=60.0)


@dataclass
class GatedStore(FaultyStore):
    """Writes wait until the gate is open."""

    gate: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        self.reached.set()
        assert self.gate.wait(30)
        super().put_many(puts, timeout_seconds=timeout_seconds)


@dataclass
class Bench:
    store: GatedStore
    cache: PrefixCache
    writer: BlockWriter
    metrics: CountingMetrics

    def computed(self, first: int, count: int = TOKENS) -> tuple[BlockChain, Prefix]:
        """A conversation of its own and its KV, pinned, as the engine hands it over."""
        chain = BlockChain(BlockHash(b"r" * 32), tuple(range(first, first + count)), 4)
        promised = self.cache.reserve(Prefix(), count)
        prefix = Prefix((promised,))
        promised.positions().fill_(float(first))
        self.cache.publish(chain, prefix, 0, count)
        self.cache.pin(prefix)
        self.cache.settle(promised, count)
        return chain, prefix


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as one:
        yield one


@pytest.fixture
async def make(executor: ThreadPoolExecutor) -> AsyncIterator[Callable[..., Bench]]:
    """Writers of one thread that must give every pin back."""
    made: list[Bench] = []

    def bench(timing: StoreTiming = PATIENT, budget_bytes: int = 1 << 20) -> Bench:
        metrics, store = CountingMetrics(), GatedStore()
        cache = PrefixCache(LAYOUT, budget_bytes=budget_bytes, device=torch.device("cpu"), metrics=metrics)
        blocks = BlockStore(store, layout=LAYOUT, block_tokens=4, timing=timing, metrics=metrics)
        made.append(Bench(store, cache, BlockWriter(cache, blocks, executor), metrics))
        return made[-1]

    yield bench
    for one in made:
        one.store.gate.set()
        await one.writer.drain()
        assert one.cache.pinned_bytes == 0
        one.cache.check_integrity()


@pytest.mark.parametrize(("waited_seconds", "drops"), [(3.0, {}), (3.1, {"timeout": BLOCKS})])
async def test_a_write_waits_for_a_thread_as_long_as_the_store_may_take_for_those_before_it(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, waited_seconds: float, drops: dict[str, int]
) -> None:
    now = [0.0]
    monkeypatch.setattr("alora_serve.engine.block_writer.monotonic", lambda: now[0])
    bench = make(StoreTiming(base_seconds=1.0, bytes_per_second=SIZE_BYTES / 2.0))
    first, second = [bench.writer.start(*bench.computed(100 * number), 0) for number in (1, 2)]
    assert await asyncio.to_thread(bench.store.reached.wait, 30)
    now[0] = waited_seconds
    bench.store.gate.set()
    assert (await first).drops == {}
    assert (await second).drops == drops
    assert bench.store.calls["put"] == (BLOCKS if drops else 2 * BLOCKS)
    assert bench.metrics.counts["drop timeout"] == sum(drops.values())


async def test_writes_that_nobody_waits_for_are_dropped_rather_than_pin_most_of_memory(
    make: Callable[..., Bench],
) -> None:
    bench = make(budget_bytes=8 * SEGMENT_BYTES)
    asked = [bench.writer.start(*bench.computed(100 * number), 0, awaited=False) for number in range(1, 8)]
    assert bench.cache.pinned_bytes == PINNED_SHARE * bench.cache.budget_bytes
    awaited = bench.writer.start(*bench.computed(800), 0)
    bench.store.gate.set()
    results = await asyncio.gather(*asked)
    assert [result.drops for result in results] == [{}] * 4 + [{"backlog": BLOCKS}] * 3
    assert bench.metrics.counts["drop backlog"] == 3 * BLOCKS
    assert (await awaited).stored_bytes == SIZE_BYTES, "who waits is few"
    later = await bench.writer.start(*bench.computed(900), 0, awaited=False)
    assert later.stored_bytes == SIZE_BYTES, "there is room again"


async def test_writes_that_were_given_up_are_no_longer_those_of_few(make: Callable[..., Bench]) -> None:
    """A client whose deadline passes leaves a place, which the next one takes, and its memory to a slow store."""
    bench = make(budget_bytes=8 * SEGMENT_BYTES)
    for number in range(1, 40):
        give_up([bench.writer.start(*bench.computed(100 * number), 0)])
        await asyncio.sleep(0)
    assert bench.cache.pinned_bytes == PINNED_SHARE * bench.cache.budget_bytes
    assert bench.metrics.counts["drop backlog"] == 35 * BLOCKS
    bench.store.gate.set()


async def test_a_write_under_way_counts_as_what_it_will_have_stored(make: Callable[..., Bench]) -> None:
    bench = make()
    chain, prefix = bench.computed(100)
    bench.cache.pin(prefix)
    bench.store.gate.set()
    await bench.writer.start(chain, prefix, 0)
    bench.store.gate.clear()
    unsure = bench.writer.start(chain, prefix, 0, asked=False)
    new = bench.writer.start(*bench.computed(200), 0)
    assert bench.writer.so_far([unsure]).stored_bytes == 0, "the store has it"
    assert bench.writer.so_far([unsure, new]).stored_bytes == SIZE_BYTES
    bench.store.gate.set()
    assert (await unsure).stored_bytes == 0


async def test_a_conversation_larger_than_that_is_written_chunk_by_chunk(make: Callable[..., Bench]) -> None:
    bench = make(budget_bytes=1)
    chain, prefix = bench.computed(100)
    bench.cache.pin(prefix)
    first = bench.writer.start(chain, prefix.take(16), 0, awaited=False)
    second = bench.writer.start(chain, prefix, 16, awaited=False)
    bench.store.gate.set()
    assert (await first).stored_bytes + (await second).stored_bytes == SIZE_BYTES


async def test_what_nobody_asked_the_store_for_is_written_where_the_store_lacks_it(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.store.gate.set()
    chain, prefix = bench.computed(100)
    bench.cache.pin(prefix)
    bench.cache.pin(prefix)
    await bench.writer.start(chain, prefix, 0)
    lost = part_key(chain.full[2], 0)
    del bench.store.values[lost]
    bench.store.calls.clear()
    result = await bench.writer.start(chain, prefix, 4, asked=False)
    assert result.stored_bytes == 4 * LAYOUT.bytes_per_token
    assert bench.store.calls == {"contains": 1, "put": 1}
    assert lost in bench.store.values
    del bench.store.values[part_key(chain.full[0], 0)]
    result = await bench.writer.start(chain, prefix, 4, known=frozenset(), asked=False)
    assert result.stored_bytes == 4 * LAYOUT.bytes_per_token, "also before, where that is made sure of"


async def test_who_gives_up_waiting_leaves_the_write_and_its_memory_alone(make: Callable[..., Bench]) -> None:
    """The thread goes on reading: the memory must not be another conversation's by then."""
    bench = make()
    writes = [bench.writer.start(*bench.computed(100 * number), 0) for number in (1, 2)]

    async def wait() -> None:
        await asyncio.gather(*writes)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert bench.cache.pinned_bytes > 0
    bench.store.gate.set()
    await bench.writer.drain()
    assert len(bench.store.values) == 2 * BLOCKS
