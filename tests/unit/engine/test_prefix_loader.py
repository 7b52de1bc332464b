"""A prefix is in memory or fetched once, whoever asks and however many at a time, and every pin comes back."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import permutations

import pytest
import torch

from alora_serve.engine.block_writer import BlockWriter
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.prefix_loader import LoadedPrefix, PrefixLoader
from alora_serve.errors import StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.blocks import BlockStore
from alora_serve.kv.keys import BlockHash, part_key
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.naming import BlockNames
from alora_serve.kv.store import Sink, StoreKey
from alora_serve.kv.transfer import StoreTiming
from alora_serve.model.host_copies import DirectCopies
from alora_serve.model.kv_memory import Prefix
from faulty_store import FaultyStore
from in_process import CountingMetrics

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32")
BLOCK_TOKENS = 4
TOKENS = tuple(range(30))
SIZE_BYTES = len(TOKENS) * LAYOUT.bytes_per_token


@dataclass
class GatedStore(FaultyStore):
    """Reads wait until the gate is open."""

    gate: threading.Event = field(default_factory=threading.Event)
    handed_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Of all it holds."""
        return sum(len(value) for value in self.values.values())

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        assert self.gate.wait(30)
        super().get_many(keys, sink, timeout_seconds=timeout_seconds)
        self.handed_bytes += sum(len(self.values.get(key, b"")) for key in keys)


class Process:
    """One process's cache, loader and writer on a store."""

    def __init__(self, store: FaultyStore, executor: ThreadPoolExecutor, budget_bytes: int = 1 << 20) -> None:
        self.metrics = CountingMetrics()
        self.cache = PrefixCache(LAYOUT, budget_bytes=budget_bytes, device=torch.device("cpu"), metrics=self.metrics)
        self.names = BlockNames(BlockHash(b"r" * 32), BLOCK_TOKENS)
        self.blocks = BlockStore(
            store,
            layout=LAYOUT,
            block_tokens=BLOCK_TOKENS,
            timing=StoreTiming(),
            metrics=self.metrics,
        )
        self.asked: list[int] = []
        self.fetching = True
        self.loader = PrefixLoader(self.cache, self.blocks, executor, DirectCopies(), self.should_fetch)
        self.writer = BlockWriter(self.cache, self.blocks, executor)

    def should_fetch(self, tokens: int) -> bool:
        self.asked.append(tokens)
        return self.fetching

    def compute(self, count: int = len(TOKENS), tokens: tuple[int, ...] = TOKENS) -> Prefix:
        """Stand in for the engine: KV of the first tokens, each position's value its token, pinned."""
        chain = self.names.chain(tokens[:count])
        promised = self.cache.reserve(Prefix(), count)
        promised.segment.data[:, :, :, :count] = torch.tensor(tokens[:count]).view(1, 1, 1, count, 1)
        prefix = Prefix((promised,))
        self.cache.publish(chain, prefix, 0, count)
        self.cache.pin(prefix)
        self.cache.settle(promised, count)
        return prefix

    @property
    def pins(self) -> int:
        return sum(segment.pins for segment in self.cache._names)

    def check(self, prefix: Prefix, tokens: int, of: tuple[int, ...] = TOKENS) -> None:
        """The prefix has so many right positions; gives it back and sees that nobody else holds anything."""
        assert prefix.tokens == tokens
        values = [value for part in prefix.slices for value in part.layer(1)[1][0, :, 0].tolist()]
        assert values == list(of[:tokens])
        self.cache.release(prefix)
        self.cache.check_integrity()


@pytest.fixture
async def executor() -> AsyncIterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
async def store(executor: ThreadPoolExecutor) -> GatedStore:
    """A store that another process has filled."""
    store = GatedStore()
    writer = Process(store, executor)
    result = await writer.writer.start(writer.names.chain(TOKENS), writer.compute(), 0)
    assert result.stored_bytes == SIZE_BYTES
    assert writer.pins == 0
    store.gate.set()
    return store


async def test_where_computing_is_faster_the_store_is_not_asked(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    process.fetching = False
    chain = process.names.chain(TOKENS)
    loaded = await process.loader.load(chain, 30)
    assert (loaded.prefix.tokens, loaded.fetched_bytes, process.asked) == (0, 0, [30])
    assert loaded.misses == {"slower": 8}
    assert process.pins == 0


async def test_what_is_not_resident_is_fetched_and_then_resident(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    chain = process.names.chain(TOKENS)
    first = await process.loader.load(chain, 30)
    assert (first.fetched_tokens, first.fetched_bytes, first.misses) == (30, SIZE_BYTES, {})
    assert len(first.present) == 8
    process.check(first.prefix, 30)
    again = await process.loader.load(chain, 30)
    assert (again.fetched_tokens, again.fetched_bytes, store.calls["get"]) == (0, 0, 1)
    process.check(again.prefix, 30)
    assert process.pins == 0
    # One look-up a load: the first found nothing, the second all.
    assert process.metrics.counts["resident tokens"] == 30


async def test_only_what_is_not_resident_is_fetched(store: GatedStore, executor: ThreadPoolExecutor) -> None:
    process = Process(store, executor)
    process.cache.release(process.compute(16))
    loaded = await process.loader.load(process.names.chain(TOKENS), 30)
    assert (loaded.fetched_tokens, loaded.fetched_bytes) == (14, 14 * LAYOUT.bytes_per_token)
    assert len(loaded.prefix.slices) == 1
    process.check(loaded.prefix, 30)
    assert process.pins == 0


async def test_a_limit_cuts_a_block(store: GatedStore, executor: ThreadPoolExecutor) -> None:
    process = Process(store, executor)
    process.check((await process.loader.load(process.names.chain(TOKENS), 21)).prefix, 21)
    process.check((await process.loader.load(process.names.chain(TOKENS), 19)).prefix, 19)
    assert process.pins == 0


async def test_a_hole_in_the_store_gives_what_stands_before_it(store: GatedStore, executor: ThreadPoolExecutor) -> None:
    process = Process(store, executor)
    chain = process.names.chain(TOKENS)
    del store.values[part_key(chain.full[2], 0)]
    loaded = await process.loader.load(chain, 30)
    assert (loaded.fetched_tokens, loaded.misses) == (8, {"absent": 1})
    process.check(loaded.prefix, 8)
    assert process.pins == 0
    # What was reserved for the rest is free, not half-filled memory that somebody finds.
    process.check((await process.loader.load(chain, 8)).prefix, 8)


async def test_a_dead_store_gives_what_is_resident(store: GatedStore, executor: ThreadPoolExecutor) -> None:
    process = Process(store, executor)
    process.cache.release(process.compute(8))
    store.faults["get", -1] = StoreUnavailableError("refused")
    loaded = await process.loader.load(process.names.chain(TOKENS), 30)
    assert (loaded.fetched_tokens, loaded.misses) == (0, {"unavailable": 6})
    process.check(loaded.prefix, 8)
    assert process.pins == 0


async def _burst(process: Process, count: int) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(process.loader.load(process.names.chain(TOKENS), 30)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_a_fan_out_fetches_its_prefix_once(store: GatedStore, executor: ThreadPoolExecutor) -> None:
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _burst(process, 5)
    store.gate.set()
    loaded = await asyncio.gather(*tasks)
    assert store.calls["get"] == 1
    assert sorted(each.fetched_bytes for each in loaded) == [0, 0, 0, 0, SIZE_BYTES]
    assert sorted(each.fetched_tokens for each in loaded) == [0, 0, 0, 0, 30]
    assert len({each.prefix for each in loaded}) == 1
    for each in loaded:
        process.check(each.prefix, 30)
    assert process.pins == 0


@pytest.mark.parametrize("leaving", [[0], [1, 2], [0, 1, 2, 3]])
async def test_those_who_go_away_leave_the_fetch_to_the_others(
    store: GatedStore, executor: ThreadPoolExecutor, leaving: list[int]
) -> None:
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _burst(process, 5)
    for index in leaving:
        tasks[index].cancel()
    await asyncio.sleep(0)
    store.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for index, result in enumerate(results):
        if index in leaving:
            assert isinstance(result, asyncio.CancelledError)
        else:
            process.check(result.prefix, 30)
    assert process.pins == 0
    assert store.calls["get"] == 1
    process.check(process.cache.acquire(process.names.chain(TOKENS), 30), 30)


async def test_one_who_joins_late_keeps_what_became_resident_meanwhile(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    store.gate.clear()
    store.values.clear()
    [early] = await _burst(process, 1)
    process.cache.release(process.compute(12))
    [late] = await _burst(process, 1)
    store.gate.set()
    process.check((await early).prefix, 0)
    process.check((await late).prefix, 12)
    assert process.pins == 0


async def test_a_prefix_larger_than_the_budget_is_used_by_all_who_wait_for_it(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    """If the fetch let go of it before they took hold, it would be evicted at once and everyone would recompute it."""
    process = Process(store, executor, budget_bytes=0)
    loaded = await asyncio.gather(*await _burst(process, 3))
    for each in loaded:
        process.check(each.prefix, 30)
    assert process.pins == 0
    assert process.cache.size_bytes == 0


async def test_a_defect_while_fetching_reaches_everyone_and_leaves_no_pin(
    store: GatedStore, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(store, executor)
    process.cache.release(process.compute(8))
    monkeypatch.setattr(process.blocks, "fetch", lambda *_: 1 / 0)
    results = await asyncio.gather(*await _burst(process, 3), return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError] * 3
    assert process.pins == 0
    monkeypatch.undo()
    process.check((await process.loader.load(process.names.chain(TOKENS), 30)).prefix, 30)


@pytest.mark.parametrize("failing", ["reserve", "begin"])
async def test_a_fetch_that_cannot_begin_leaves_no_pin_and_no_promise(
    store: GatedStore, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """There may be no memory left."""
    process = Process(store, executor)
    process.cache.release(process.compute(8))
    used_bytes = process.cache.used_bytes

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(process.cache if failing == "reserve" else process.loader._copies, failing, fail)
    with pytest.raises(MemoryError, match="no room"):
        await process.loader.load(process.names.chain(TOKENS), 30)
    assert (process.pins, process.cache.used_bytes) == (0, used_bytes)
    monkeypatch.undo()
    process.check((await process.loader.load(process.names.chain(TOKENS), 30)).prefix, 30)
    assert process.pins == 0


# --- loads of different ends ------------------------------------------------------------------------------------------

OPENED = (*TOKENS, 90, 91, 92, 93, 94)
"""The conversation with a generation prompt, as the base model's turn has it; the last token is always run."""
OTHER = (*TOKENS[:18], *range(60, 72))
"""Another conversation, that begins with the same four blocks and a half."""
WANTED = {"adapter": (TOKENS, 30), "base": (OPENED, 34), "across the edge": (TOKENS, 27)}


async def _start(process: Process, *wanted: tuple[tuple[int, ...], int]) -> list[asyncio.Task]:
    """Loads that begin one after the other, up to where they wait."""
    tasks = []
    for tokens, limit in wanted:
        tasks.append(asyncio.create_task(process.loader.load(process.names.chain(tokens), limit)))
        await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize("order", list(permutations(WANTED)))
async def test_a_fan_out_of_adapters_and_the_base_model_fetches_its_prefix_once(
    store: GatedStore, executor: ThreadPoolExecutor, order: tuple[str, ...]
) -> None:
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _start(process, *(WANTED[name] for name in order))
    store.gate.set()
    loaded = dict(zip(order, await asyncio.gather(*tasks), strict=True))
    # Of a block in which the first one's positions end, the rest is fetched as a block again.
    again_bytes = sum(each.fetched_bytes for each in loaded.values()) - SIZE_BYTES
    assert again_bytes == (BLOCK_TOKENS * LAYOUT.bytes_per_token if order[0] == "across the edge" else 0)
    assert sum(each.fetched_tokens for each in loaded.values()) == 30
    assert len({part.segment for each in loaded.values() for part in each.prefix.slices}) == 1
    for name, tokens in (("adapter", 30), ("base", 30), ("across the edge", 27)):
        process.check(loaded[name].prefix, tokens)
    assert process.pins == 0


async def test_conversations_that_have_blocks_in_common_fetch_these_once(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    writer = Process(store, executor)
    await writer.writer.start(writer.names.chain(OTHER), writer.compute(30, OTHER), 0)
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _start(process, (TOKENS, 30), (OTHER, 30), (OTHER, 29))
    assert len(process.loader._flights) == 1
    store.gate.set()
    loaded = await asyncio.gather(*tasks)
    # Four blocks and a half come with the first one's; the second one's brings the rest for itself and the third.
    assert [each.fetched_tokens for each in loaded] == [30, 12, 0]
    assert loaded[2].prefix.slices[0].segment is loaded[0].prefix.slices[0].segment
    process.check(loaded[0].prefix, 30)
    process.check(loaded[1].prefix, 30, OTHER)
    process.check(loaded[2].prefix, 29, OTHER)
    assert process.pins == 0


async def test_conversations_that_begin_with_a_few_equal_tokens_do_not_wait_for_each_other(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _start(process, (TOKENS, 30), ((*TOKENS[:3], 70, 71, 72), 6))
    assert len(process.loader._flights) == 2
    store.gate.set()
    process.check((await tasks[0]).prefix, 30)
    process.check((await tasks[1]).prefix, 0)
    assert process.pins == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
@pytest.mark.parametrize("order", [("adapter", "base"), ("base", "adapter")])
async def test_what_the_first_fetch_fails_with_does_not_reach_one_that_waited_for_it(
    store: GatedStore, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str],
    error: type[BaseException],
) -> None:  # fmt: skip
    process = Process(store, executor)
    fetch, calls = process.blocks.fetch, []

    def fail_first(*arguments: object) -> object:
        calls.append(arguments)
        assert store.gate.wait(30)
        if len(calls) == 1:
            raise error
        return fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(process.blocks, "fetch", fail_first)
    store.gate.clear()
    tasks = await _start(process, *(WANTED[name] for name in order))
    assert len(process.loader._flights) == 1
    store.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], error)
    assert results[1].fetched_bytes == SIZE_BYTES
    process.check(results[1].prefix, 30)
    assert process.pins == 0


@pytest.mark.parametrize("leaving", [0, 1])
@pytest.mark.parametrize("order", [("adapter", "base"), ("base", "adapter")])
async def test_one_of_two_with_different_ends_leaves_and_the_other_gets_all(
    store: GatedStore, executor: ThreadPoolExecutor, order: tuple[str, str], leaving: int
) -> None:
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _start(process, *(WANTED[name] for name in order))
    tasks[leaving].cancel()
    await asyncio.sleep(0)
    store.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[leaving], asyncio.CancelledError)
    process.check(results[1 - leaving].prefix, 30)
    assert process.pins == 0
    assert store.handed_bytes == store.size_bytes


@pytest.mark.parametrize("fault", ["absent", "unavailable", "timeout"])
async def test_a_store_that_did_not_give_a_block_to_the_first_is_not_asked_for_it_by_the_second(
    store: GatedStore, executor: ThreadPoolExecutor, fault: str
) -> None:
    """Where it takes all of its time, one after the other would take twice as long as both at once."""
    process = Process(store, executor)
    if fault == "absent":
        del store.values[part_key(process.names.chain(TOKENS).full[2], 0)]
    else:
        store.faults["get", -1] = {"unavailable": StoreUnavailableError, "timeout": StoreTimeoutError}[fault]("gone")
        store.values_before_fault = 2
    store.gate.clear()
    tasks = await _start(process, WANTED["adapter"], WANTED["base"])
    store.gate.set()
    loaded = await asyncio.gather(*tasks)
    assert store.calls["get"] == 1
    assert [each.misses for each in loaded] == [{fault: 1 if fault == "absent" else 6}] * 2
    for each in loaded:
        process.check(each.prefix, 8)
    assert process.pins == 0


async def test_a_longer_conversation_asks_for_a_block_of_which_the_first_wanted_a_part(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    """A store lets partial tails go first, and may have the full block of a turn that went on."""
    writer = Process(store, executor)
    await writer.writer.start(writer.names.chain(OPENED), writer.compute(35, OPENED), 0)
    tail = writer.names.chain(TOKENS).tail(7, 2)
    del store.values[part_key(tail, 0)]
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _start(process, WANTED["adapter"], WANTED["base"])
    store.gate.set()
    adapter, base = await asyncio.gather(*tasks)
    process.check(adapter.prefix, 28)
    process.check(base.prefix, 34, OPENED)
    assert process.pins == 0


async def test_one_who_may_read_of_a_full_block_does_not_share_a_search_for_tails(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _start(process, (TOKENS[:23], 21), (TOKENS, 21))
    store.gate.set()
    shorter, longer = await asyncio.gather(*tasks)
    process.check(shorter.prefix, 20)
    process.check(longer.prefix, 21)
    assert process.pins == 0


async def test_what_a_wait_for_another_took_is_no_slowness_of_the_store(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    store.gate.clear()
    tasks = await _start(process, WANTED["base"], WANTED["adapter"])
    store.gate.set()
    first, second = await asyncio.gather(*tasks)
    assert 0 < first.own_seconds <= first.seconds
    assert second.own_seconds == 0 < second.seconds
    for each in (first, second):
        process.check(each.prefix, 30)


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_is_wanted_at_once_is_right_and_fetched_about_once(
    store: GatedStore, executor: ThreadPoolExecutor, seed: int
) -> None:
    chance = random.Random(seed)
    writer = Process(store, executor)
    await writer.writer.start(writer.names.chain(OTHER), writer.compute(30, OTHER), 0)
    process = Process(store, executor)
    store.gate.clear()
    wanted = []
    for _ in range(8):
        tokens = chance.choice([TOKENS, OTHER, OPENED])
        tokens = tokens[: chance.randint(20, len(tokens))]
        wanted.append((tokens, len(tokens) - chance.randint(0, 3)))
    tasks = await _start(process, *wanted)
    leaving = chance.sample(range(8), 2)
    for index in leaving:
        tasks[index].cancel()
    store.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for index, ((tokens, limit), result) in enumerate(zip(wanted, results, strict=True)):
        if index not in leaving:
            assert min(limit, len(tokens) - len(tokens) % BLOCK_TOKENS, 28) <= result.prefix.tokens <= limit
            process.check(result.prefix, result.prefix.tokens, tokens)
    await landed(process)
    # All that is stored once; and where ends lie inside a block, that block again.
    assert store.handed_bytes <= store.size_bytes + 8 * BLOCK_TOKENS * LAYOUT.bytes_per_token


# --- deadlines end it -------------------------------------------------------------------------------------------------


@dataclass
class PartwiseStore(GatedStore):
    """Hands out one value, then waits for the gate before each further one."""

    handed: int = 0
    begun: threading.Event = field(default_factory=threading.Event)

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        self.calls["get"] += 1
        for index, key in enumerate(keys):
            if key in self.values:
                sink(index, memoryview(self.values[key]))
                self.handed += 1
                self.begun.set()
                assert self.gate.wait(30)


async def gone(*loading: asyncio.Task[LoadedPrefix]) -> None:
    for task in loading:
        task.cancel()
    await asyncio.gather(*loading, return_exceptions=True)


async def landed(process: Process) -> None:
    """Wait until no pin is left: the fetch has given back what it held."""
    async with asyncio.timeout(30):
        while process.pins:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_fetch_that_waits_for_a_thread_never_begins_once_nobody_waits_for_it(store: GatedStore) -> None:
    with ThreadPoolExecutor(1) as only_thread:
        process = Process(store, only_thread)
        store.gate.clear()
        store.calls.clear()
        other = process.names.chain(tuple(range(100, 130)))
        first = asyncio.create_task(process.loader.load(process.names.chain(TOKENS), 30))
        queued = [asyncio.create_task(process.loader.load(other, 30)) for _ in range(2)]
        await asyncio.sleep(0.01)
        await gone(*queued)
        store.gate.set()
        process.check((await first).prefix, 30)
        await asyncio.get_running_loop().run_in_executor(only_thread, lambda: None)
        assert store.calls["get"] == 1
        await landed(process)


async def test_a_fetch_ends_between_parts_once_nobody_waits_for_it(executor: ThreadPoolExecutor) -> None:
    store = PartwiseStore()
    writer = Process(store, executor)
    await writer.writer.start(writer.names.chain(TOKENS), writer.compute(), 0)
    process = Process(store, executor)
    chain = process.names.chain(TOKENS)
    loading = [asyncio.create_task(process.loader.load(chain, limit)) for limit in (30, 30, 22)]
    await asyncio.to_thread(store.begun.wait, 30)
    await gone(*loading)
    again = asyncio.create_task(process.loader.load(chain, 30))
    await asyncio.sleep(0.01)
    assert store.calls["get"] == 2, "who comes now does not join what is about to end"
    store.gate.set()
    process.check((await again).prefix, 30)
    await landed(process)
    assert store.handed == 1 + 8, "of the first fetch one part, of the second all"
    process.cache.check_integrity()


# --- writing ----------------------------------------------------------------------------------------------------------


async def test_only_blocks_from_the_start_are_written(store: GatedStore, executor: ThreadPoolExecutor) -> None:
    process = Process(store, executor)
    store.values.clear()
    result = await process.writer.start(process.names.chain(TOKENS), process.compute(), 18)
    assert result.stored_bytes == (30 - 16) * LAYOUT.bytes_per_token
    assert process.pins == 0


async def test_with_known_blocks_given_all_others_are_made_sure_of(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    """A resident block may have left the store since: a handle that named it would send workers to nothing."""
    process = Process(store, executor)
    chain = process.names.chain(TOKENS)
    for block in (0, 3):
        del store.values[part_key(chain.full[block], 0)]
    known = {chain.full[1], chain.full[3]}
    result = await process.writer.start(chain, process.compute(), 30, known=known)
    # Block 3 is believed to be there because it was just seen; block 0 is asked for and written.
    assert result.stored_bytes == 4 * LAYOUT.bytes_per_token
    assert part_key(chain.full[0], 0) in store.values
    assert process.pins == 0


async def test_a_prefix_shorter_than_its_chain_is_written_with_its_own_tail(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    store.values.clear()
    await process.writer.start(process.names.chain(TOKENS), process.compute(10), 0)
    loaded = await Process(store, executor).loader.load(process.names.chain(TOKENS[:10]), 10)
    assert (loaded.fetched_tokens, loaded.misses) == (10, {})


async def test_a_write_that_fails_is_counted_and_gives_its_pin_back(
    store: GatedStore, executor: ThreadPoolExecutor
) -> None:
    process = Process(store, executor)
    store.faults["put", -1] = StoreUnavailableError("refused")
    result = await process.writer.start(process.names.chain(TOKENS), process.compute(), 0)
    assert result.drops == {"unavailable": 8}
    assert process.pins == 0


async def test_background_writes_are_waited_for_when_draining(store: GatedStore, executor: ThreadPoolExecutor) -> None:
    process = Process(store, executor)
    await process.writer.drain()
    store.values.clear()
    task = process.writer.start(process.names.chain(TOKENS), process.compute(), 0)
    await process.writer.drain()
    assert len(store.values) == 8
    assert task.result().stored_bytes > 0
    assert process.pins == 0
