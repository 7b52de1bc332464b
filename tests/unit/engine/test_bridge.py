"""Events reach the loop in order, and nothing is lost or held for readers that went away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from alora_serve.engine.answer import Answer
from alora_serve.engine.bridge import RunningSequence, run_sequence
from alora_serve.engine.core import CoreOptions, ServingCore
from alora_serve.engine.events import BaseComputed, SequenceDone, SequenceEvent
from alora_serve.engine.sequence_request import SequenceRequest
from alora_serve.errors import AloraServeError, UnavailableError
from alora_serve.kv.keys import BlockChain
from alora_serve.model.kv_memory import Prefix
from alora_serve.model.loader import BaseModel
from alora_serve.model.text import TextStream
from alora_serve.types import SamplingParams, TokenChunk
from in_process import CountingMetrics, MemoryStore

PROMPT = tuple(range(1, 30))


@dataclass
class Bench:
    core: ServingCore
    metrics: CountingMetrics = field(default_factory=CountingMetrics)

    def request(self, *, prefill: bool = False, max_tokens: int = 4) -> SequenceRequest:
        answer = None if prefill else Answer(TextStream(self.core.model.tokenizer.decode), max_tokens)
        sampling = None if prefill else SamplingParams(max_tokens=max_tokens)
        chain = self.core.names.chain(PROMPT)
        return SequenceRequest(prompt=PROMPT, prefix=Prefix(), chain=chain, sampling=sampling, answer=answer)

    @property
    def pins(self) -> int:
        return sum(segment.pins for segment in self.core.cache._names)

    def discard(self, event: SequenceEvent) -> None:
        if isinstance(event, BaseComputed):
            self.core.cache.release(event.prefix)

    async def quiet(self) -> None:
        """Wait until the engine has nothing in its batch and the loop has taken all its events."""
        async with run_sequence(self.core.engine, self.request(prefill=True)) as running:
            async for event in running:
                self.discard(event)
        await asyncio.sleep(0)


@pytest.fixture
async def bench(model: BaseModel) -> AsyncIterator[Bench]:
    metrics = CountingMetrics()
    core = ServingCore(model, MemoryStore(), CoreOptions(block_tokens=8), metrics)
    yield Bench(core, metrics)
    core.close()
    await asyncio.sleep(0)
    core.cache.check_integrity()
    assert sum(segment.pins for segment in core.cache._names) == 0


async def test_events_come_in_order_up_to_the_last(bench: Bench) -> None:
    async with run_sequence(bench.core.engine, bench.request()) as running:
        events = [event async for event in running]
    kinds = [type(event) for event in events]
    assert kinds == [BaseComputed, *[TokenChunk] * 3, BaseComputed, TokenChunk, SequenceDone]
    assert running.ended
    computed = [event for event in events if isinstance(event, BaseComputed)]
    # 29 tokens of prompt: a block is told of when it is full.
    assert [(part.start, part.end) for part in computed] == [(0, 24), (24, 32)]
    for part in computed:
        bench.core.cache.release(part.prefix)


async def test_one_who_leaves_before_reading_anything_leaves_no_pin(bench: Bench) -> None:
    async with run_sequence(bench.core.engine, bench.request(prefill=True)):
        pass
    await bench.quiet()
    assert bench.pins == 0


async def test_what_arrived_and_was_not_read_is_given_back(bench: Bench) -> None:
    """The sequence is done and its pinned prefix waits in the reader's queue when the reader goes away."""
    async with run_sequence(bench.core.engine, bench.request(prefill=True)) as running:
        await bench.quiet()
        assert running._events.qsize() == 2
        assert bench.pins > 0
    assert bench.pins == 0


async def test_what_arrives_after_the_reader_left_is_given_back(bench: Bench) -> None:
    running = RunningSequence(bench.core.engine)
    prefix = bench.core.cache.acquire(BlockChain(bench.core.names.chain(())._root, PROMPT, 8), 8)
    promised = bench.core.cache.reserve(prefix, 8)
    held = prefix.append(promised)
    running.leave()
    running.sink(BaseComputed(bench.core.names.chain(PROMPT), held, 0, 8))
    assert bench.pins == 1
    await asyncio.sleep(0)
    assert bench.pins == 0


async def test_events_of_one_step_wake_the_loop_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    running = [RunningSequence(bench.core.engine) for _ in range(16)]
    wakes = []
    call = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (wakes.append(1), call(*args)))
    for step in range(2):
        for sequence in running:
            sequence.sink(TokenChunk((step,), "a"))
        await asyncio.sleep(0)
        assert len(wakes) == step + 1
    assert [sequence._events.qsize() for sequence in running] == [2] * 16


async def test_leaving_early_cancels_the_sequence(bench: Bench) -> None:
    async with run_sequence(bench.core.engine, bench.request(max_tokens=400)) as running:
        async for event in running:
            if isinstance(event, TokenChunk):
                break
            bench.discard(event)
    await bench.quiet()
    assert bench.core.engine.load.running == 0
    assert bench.metrics.counts["step tokens"] < 400
    assert bench.pins == 0


async def test_a_reader_that_is_cancelled_cancels_the_sequence(bench: Bench) -> None:
    reading = asyncio.Event()

    async def read() -> None:
        async with run_sequence(bench.core.engine, bench.request(max_tokens=400)) as running:
            async for event in running:
                bench.discard(event)
                reading.set()

    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bench.quiet()
    assert bench.core.engine.load.running == 0


async def test_a_failure_is_raised_where_it_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.core.engine._stepper._runner, "forward", lambda *_: 1 / 0)
    async with run_sequence(bench.core.engine, bench.request()) as running:
        with pytest.raises(AloraServeError, match="ZeroDivisionError"):
            _ = [event async for event in running]
    assert running.ended


async def test_a_closed_engine_takes_nothing_in(bench: Bench) -> None:
    bench.core.close()
    with pytest.raises(UnavailableError):
        async with run_sequence(bench.core.engine, bench.request()):
            pytest.fail("it ran")


async def test_events_for_a_loop_that_is_closed_are_dropped_with_their_pins(bench: Bench) -> None:
    """An exception here would end the engine's thread, and with it every other stream."""

    async def make() -> RunningSequence:
        return RunningSequence(bench.core.engine)

    running = await asyncio.to_thread(lambda: asyncio.run(make()))
    promised = bench.core.cache.reserve(Prefix(), 8)
    running.sink(BaseComputed(bench.core.names.chain(PROMPT), Prefix((promised,)), 0, 8))
    assert bench.pins == 0
    running.sink(TokenChunk((1,), "a"))


async def test_events_that_a_loop_was_woken_for_and_never_took_are_dropped_with_the_next(bench: Bench) -> None:
    async def make() -> RunningSequence:
        return RunningSequence(bench.core.engine)

    def computed() -> BaseComputed:
        promised = bench.core.cache.reserve(Prefix(), 8)
        return BaseComputed(bench.core.names.chain(PROMPT), Prefix((promised,)), 0, 8)

    loop = asyncio.new_event_loop()
    running = await asyncio.to_thread(loop.run_until_complete, make())
    running.sink(computed())
    loop.close()
    assert bench.pins == 1
    running.sink(computed())
    assert bench.pins == 0
