"""Sequences join, run, leave, fail and are cancelled, and the engine, its memory and the others go on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
import torch
from structlog.testing import capture_logs
from torch import Tensor

from alora_serve.adapters.lora import LoadedAdapter, LoraPair
from alora_serve.engine import engine as engine_module
from alora_serve.engine import pulse
from alora_serve.engine.answer import Answer, Ending
from alora_serve.engine.engine import Engine
from alora_serve.engine.events import BaseComputed, SequenceDone, SequenceEvent, SequenceFailed
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.sequence_request import SequenceId, SequenceRequest
from alora_serve.engine.stepper import EngineLimits
from alora_serve.errors import AloraServeError, InvalidRequestError, OverloadedError, StepFailedError, UnavailableError
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.model.kv_memory import Prefix
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.model.step import Span
from alora_serve.model.tails import FIRST_TAIL_TOKENS
from alora_serve.model.text import TextStream
from alora_serve.types import AdapterDigest, AdapterInfo, FinishReason, Heartbeat, SamplingParams, TokenChunk
from in_process import CountingMetrics
from tiny_models import FAMILIES, VOCABULARY, load_reference, save_model

torch.set_num_threads(1)

BLOCK_TOKENS = 8
ROOT = BlockHash(b"r" * 32)
PATIENCE_SECONDS = 60.0


def _prompt(seed: int, count: int = 20) -> tuple[int, ...]:
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@dataclass
class Run:
    """A submitted sequence and what it said so far."""

    cache: PrefixCache
    events: list[SequenceEvent] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    id: SequenceId | None = None

    def sink(self, event: SequenceEvent) -> None:
        self.events.append(event)
        if isinstance(event, BaseComputed):
            self.cache.release(event.prefix)
        if isinstance(event, SequenceDone | SequenceFailed):
            self.ended.set()

    def last(self) -> SequenceEvent:
        assert self.ended.wait(PATIENCE_SECONDS)
        return self.events[-1]

    def done(self) -> SequenceDone:
        last = self.last()
        assert isinstance(last, SequenceDone)
        return last

    def error(self) -> AloraServeError:
        last = self.last()
        assert isinstance(last, SequenceFailed)
        return last.error

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for event in self.events if isinstance(event, TokenChunk) for token in event.token_ids)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TokenChunk | SequenceDone))


class Gate:
    """Holds every forward pass until the test lets it run, and can make one fail."""

    def __init__(self, engine: Engine) -> None:
        self._forward = engine._stepper._runner.forward
        self._arrived: queue.SimpleQueue[Sequence[Span]] = queue.SimpleQueue()
        self._go: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._open = False
        engine._stepper._runner.forward = self.forward  # type: ignore[method-assign]

    def forward(self, spans: Sequence[Span], output: Sequence[bool], adapters: object) -> Tensor | None:
        if not self._open:
            self._arrived.put(spans)
            error = self._go.get(timeout=PATIENCE_SECONDS)
            if error is not None:
                raise error
        return self._forward(spans, output, adapters)

    def waiting(self) -> list[tuple[int, ...]]:
        """The tokens of each span in the pass that stands at the gate."""
        return [span.tokens for span in self._arrived.get(timeout=PATIENCE_SECONDS)]

    def let(self, error: Exception | None = None) -> None:
        self._go.put(error)

    def open(self) -> None:
        """Let the pass at the gate and all later ones run."""
        self._open = True
        self._go.put(None)


@dataclass
class Bench:
    engine: Engine
    cache: PrefixCache
    metrics: CountingMetrics
    model: BaseModel

    def submit(
        self,
        prompt: tuple[int, ...],
        *,
        stop: tuple[str, ...] = (),
        end_ids: tuple[int, ...] = (),
        prefill: bool = False,
        base_until: int | None = None,
        adapter: LoadedAdapter | None = None,
        prefix: Prefix | None = None,
        generated: tuple[int, ...] = (),
        **sampling: object,
    ) -> Run:
        chain = BlockChain(ROOT, prompt, BLOCK_TOKENS)
        params = SamplingParams(**{"max_tokens": 6, **sampling})  # type: ignore[arg-type]
        text = TextStream(self.model.tokenizer.decode, stop)
        answer = Answer(text, params.max_tokens, frozenset(end_ids))
        answer.restore(generated)
        run = Run(self.cache)
        request = SequenceRequest(
            prompt=prompt,
            prefix=self.cache.acquire(chain, len(prompt) - 1) if prefix is None else prefix,
            chain=chain,
            base_until=base_until,
            adapter=adapter,
            sampling=None if prefill else params,
            generated=generated,
            answer=None if prefill else answer,
        )
        run.id = self.engine.submit(request, run.sink)
        return run

    @property
    def pins(self) -> int:
        return sum(segment.pins for segment in self.cache._names)

    def settle(self) -> None:
        """Wait until the engine has taken all messages so far: it runs one more sequence to its end."""
        self.submit((1, 2), prefill=True).done()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 2
    return save_model(tmp_path_factory.mktemp("models") / "llama", config)


@pytest.fixture(scope="module")
def model(directory: Path) -> BaseModel:
    return load_base_model(directory, dtype="float32")


@pytest.fixture
def make_bench(model: BaseModel) -> Iterator[Callable[..., Bench]]:
    """Engines that must leave no pin and no unbalanced book behind, whatever the test did to them."""
    made: list[Bench] = []

    def make(budget_bytes: int = 1 << 26, **limits: int) -> Bench:
        metrics = CountingMetrics()
        cache = PrefixCache(model.layout, budget_bytes=budget_bytes, device=model.device, metrics=metrics)
        bench = Bench(Engine(model, cache, limits=EngineLimits(**limits), metrics=metrics), cache, metrics, model)
        made.append(bench)
        return bench

    yield make
    for bench in made:
        bench.engine.close()
        bench.cache.check_integrity()
        assert bench.pins == 0


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture(scope="module")
def greedy(directory: Path) -> Callable[[tuple[int, ...], int], tuple[int, ...]]:
    """What the stock model says."""
    reference = load_reference(directory)

    def generate(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tuple(tokens[len(prompt) :])

    return generate


# --- running and stopping ---------------------------------------------------------------------------------------------


def test_a_sequence_runs_to_max_tokens(bench: Bench, greedy: Callable[..., tuple[int, ...]]) -> None:
    run = bench.submit(_prompt(1), logprobs=True)
    done = run.done()
    assert done.ending == Ending(FinishReason.LENGTH)
    assert run.tokens == done.generated == greedy(_prompt(1), 6)
    assert done.stats.computed_tokens == 20
    assert done.stats.generated_tokens == 6
    assert all(len(event.logprobs) == 1 for event in run.events if isinstance(event, TokenChunk))


def test_it_computes_on_as_many_threads_as_its_maker_whatever_another_is_at(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a fetch copies a small part, the number that a thread begins with is one."""
    torch.set_num_threads(2)
    bench = make_bench()
    torch.set_num_threads(1)
    forward, seen = bench.engine._stepper._runner.forward, set[int]()

    def watch(*arguments: object) -> Tensor | None:
        seen.add(torch.get_num_threads())
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.engine._stepper._runner, "forward", watch)
    bench.submit(_prompt(1)).done()
    assert seen == {2}


def test_a_token_of_the_end_ends_it(bench: Bench, greedy: Callable[..., tuple[int, ...]]) -> None:
    whole = greedy(_prompt(1), 6)
    end = next(token for token in whole if token != whole[0])
    count = whole.index(end) + 1
    done = bench.submit(_prompt(1), end_ids=(end,)).done()
    assert (done.ending, done.generated) == (Ending(FinishReason.STOP), whole[:count])


def test_a_stop_string_ends_it_before_the_string(bench: Bench) -> None:
    """Forced to say "ab" for ever by a bias on both letters and a penalty on the one just said."""
    letters = [token for token in range(256) if bench.model.tokenizer.decode([token]) in ("a", "b")]
    bias = dict.fromkeys(letters, 50.0)
    free = bench.submit(_prompt(1), logit_bias=bias, frequency_penalty=2.0, max_tokens=12)
    free.done()
    text = free.text
    assert set(text) == {"a", "b"}
    stop = text[4:6]
    run = bench.submit(_prompt(1), logit_bias=bias, frequency_penalty=2.0, max_tokens=12, stop=(stop,))
    done = run.done()
    assert done.ending == Ending(FinishReason.STOP, stop)
    assert run.text == text[: text.index(stop)]
    assert len(done.generated) == text.index(stop) + len(stop)


def test_text_held_back_for_a_stop_string_that_does_not_come_is_given_at_the_end(bench: Bench) -> None:
    free = bench.submit(_prompt(1), logit_bias={101: 100.0}, max_tokens=4)
    free.done()
    run = bench.submit(_prompt(1), logit_bias={101: 100.0}, max_tokens=4, stop=(free.text + "x",))
    assert run.done().text == free.text
    assert run.text == free.text


def test_a_prefill_generates_nothing_and_leaves_its_kv(bench: Bench) -> None:
    run = bench.submit(_prompt(1), prefill=True)
    done = run.done()
    assert (done.ending, done.generated, run.text) == (None, (), "")
    [computed] = [event for event in run.events if isinstance(event, BaseComputed)]
    assert (computed.start, computed.end) == (0, 20)
    again = bench.submit(_prompt(1)).done()
    assert again.stats.computed_tokens == 1


def test_a_prefill_of_what_is_resident_ends_at_once(bench: Bench) -> None:
    prompt = _prompt(1)
    bench.submit(prompt, prefill=True).done()
    steps = bench.metrics.counts["steps"]
    prefix = bench.cache.acquire(BlockChain(ROOT, prompt, BLOCK_TOKENS), 20)
    run = bench.submit(prompt, prefill=True, prefix=prefix)
    assert run.done().stats.computed_tokens == 0
    assert [type(event) for event in run.events] == [SequenceDone]
    assert bench.metrics.counts["steps"] == steps


def test_a_base_turn_leaves_its_answer_resident(bench: Bench, greedy: Callable[..., tuple[int, ...]]) -> None:
    run = bench.submit(_prompt(1), max_tokens=10)
    answer = run.done().generated
    # All but the last token, whose KV nobody has computed.
    found = bench.cache.acquire(BlockChain(ROOT, _prompt(1) + answer, BLOCK_TOKENS), 30)
    assert found.tokens == 29
    bench.cache.release(found)
    assert bench.submit(_prompt(1) + answer).done().generated == greedy(_prompt(1) + answer, 6)


def _taken(bench: Bench) -> list[int]:
    return sorted(segment.used for segment in bench.cache._names)


def test_the_same_answer_again_takes_no_more_memory(bench: Bench) -> None:
    bench.submit(_prompt(1), max_tokens=30).done()
    size, taken = bench.cache.size_bytes, _taken(bench)
    for run in [bench.submit(_prompt(1), max_tokens=30) for _ in range(5)]:
        run.done()
    assert (bench.cache.size_bytes, _taken(bench)) == (size, taken)


def test_a_longer_answer_adds_what_is_new_to_it(bench: Bench, greedy: Callable[..., tuple[int, ...]]) -> None:
    short = bench.submit(_prompt(1), max_tokens=11).done().generated
    size, (taken,) = bench.cache.size_bytes, _taken(bench)
    answer = bench.submit(_prompt(1), max_tokens=50).done().generated
    assert answer[:11] == short
    assert (bench.cache.size_bytes, _taken(bench)) == (size, [taken + 39])
    assert bench.submit((*_prompt(1), *answer)).done().generated == greedy((*_prompt(1), *answer), 6)


def test_answers_that_part_share_what_they_have_in_common(bench: Bench, greedy: Callable[..., tuple[int, ...]]) -> None:
    answer = bench.submit(_prompt(1), max_tokens=40).done().generated
    (taken,) = _taken(bench)
    banned = {answer[25]: -100.0}
    other = bench.submit(_prompt(1), max_tokens=40, logit_bias=banned).done().generated
    parted = next(i for i, pair in enumerate(zip(answer, other, strict=True)) if len(set(pair)) == 2)
    # Whole blocks are shared: what the two have in common of the block they part in is in both.
    shared = (20 + parted) // BLOCK_TOKENS * BLOCK_TOKENS
    assert _taken(bench) == sorted([taken, 59 - shared])
    for said in (answer, other):
        assert bench.submit((*_prompt(1), *said)).done().generated == greedy((*_prompt(1), *said), 6)


def test_room_that_an_answer_did_not_need_is_there_for_the_next_turn(bench: Bench) -> None:
    conversation = (
        _prompt(1) + bench.submit(_prompt(1), max_tokens=200, end_ids=tuple(range(VOCABULARY))).done().generated
    )
    assert len(conversation) == 21
    size = bench.cache.size_bytes
    bench.submit((*conversation, *_prompt(2, 100)), prefill=True).done()
    assert bench.cache.size_bytes == size


def test_adapter_kv_is_never_resident(bench: Bench) -> None:
    adapter = _adapter(bench.model)
    bench.submit(_prompt(1), adapter=adapter, base_until=12).done()
    found = bench.cache.acquire(BlockChain(ROOT, _prompt(1), BLOCK_TOKENS), 20)
    assert found.tokens == 12
    bench.cache.release(found)
    bench.submit(_prompt(2), adapter=adapter, base_until=0).done()
    assert bench.cache.acquire(BlockChain(ROOT, _prompt(2), BLOCK_TOKENS), 20) == Prefix()


def test_a_long_answer_outgrows_its_first_memory(
    bench: Bench, greedy: Callable[..., tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alora_serve.model.tails.FIRST_TAIL_TOKENS", 2)
    monkeypatch.setattr("alora_serve.engine.sequence.BASE_GROWTH_TOKENS", 3)
    monkeypatch.setattr("alora_serve.engine.prefix_cache.MIN_SLACK_TOKENS", 1)
    idle = _adapter(bench.model, scale=0.0)
    expected = greedy(_prompt(1), 40)
    assert bench.submit(_prompt(1), max_tokens=40).done().generated == expected
    bench.submit((*_prompt(1)[:19], 9), max_tokens=3).done()
    assert bench.submit(_prompt(1), adapter=idle, base_until=7, max_tokens=40).done().generated == expected


def test_private_memory_is_counted_and_given_back(bench: Bench) -> None:
    adapter = _adapter(bench.model)
    bench.submit(_prompt(1), adapter=adapter, base_until=12, max_tokens=3).done()
    bench.submit(_prompt(2), max_tokens=1).done()  # the engine reports after each step
    assert bench.metrics.counts["peak tail bytes"] == FIRST_TAIL_TOKENS * bench.model.layout.bytes_per_token
    assert bench.metrics.counts["tail bytes"] == 0


# --- joining and leaving ----------------------------------------------------------------------------------------------


def test_an_idle_engine_waits_a_moment_for_those_who_hold_a_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fan-out's calls arrive one by one; without the wait the first would run a step of its own, the others a step
    later."""
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(engine_module, "GATHER_LIMIT_SECONDS", PATIENCE_SECONDS)
    gate = Gate(bench.engine)
    with bench.engine.place(), bench.engine.place():
        first = bench.submit(_prompt(1))
        time.sleep(0.05)
        second = bench.submit(_prompt(2))
        assert len(gate.waiting()) == 2
        gate.open()
        assert first.done()
        assert second.done()


def test_an_idle_engine_waits_for_nobody_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 2 * PATIENCE_SECONDS)
    monkeypatch.setattr(engine_module, "GATHER_LIMIT_SECONDS", 2 * PATIENCE_SECONDS)
    with bench.engine.place():
        assert bench.submit(_prompt(1)).done()


def test_an_idle_engine_does_not_wait_long(bench: Bench) -> None:
    """Who holds a place may be loading a prefix for as long as that takes."""
    with bench.engine.place(), bench.engine.place():
        assert bench.submit(_prompt(1)).done()


def test_sequences_join_and_leave_in_the_middle(bench: Bench, greedy: Callable[..., tuple[int, ...]]) -> None:
    gate = Gate(bench.engine)
    first = bench.submit(_prompt(1), max_tokens=4)
    gate.waiting()
    second = bench.submit(_prompt(2, 5), max_tokens=2)
    gate.let()
    assert [len(tokens) for tokens in gate.waiting()] == [1, 5]
    third = bench.submit(_prompt(3, 7), max_tokens=9)
    gate.let()
    assert sorted(len(tokens) for tokens in gate.waiting()) == [1, 1, 7]
    gate.let()
    assert second.done().generated == greedy(_prompt(2, 5), 2)
    assert len(gate.waiting()) == 2
    gate.open()
    assert first.done().generated == greedy(_prompt(1), 4)
    assert third.done().generated == greedy(_prompt(3, 7), 9)


def test_a_full_batch_makes_others_wait(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_sequences=2)
    gate = Gate(bench.engine)
    runs = [bench.submit(_prompt(seed), max_tokens=3) for seed in range(3)]
    gate.waiting()
    gate.let()
    gate.waiting()
    load = bench.engine.load
    assert (load.running, load.waiting) == (2, 1)
    gate.open()
    for run in runs:
        run.done()
    assert bench.metrics.counts["peak running"] == 2


def test_load_tells_what_waits_and_which_adapters_run(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_sequences=2)
    gate = Gate(bench.engine)
    named = {name: _adapter(bench.model, name=name) for name in ("running", "first", "second")}
    runs = [bench.submit(_prompt(1, 2), base_until=1, adapter=named["running"]), bench.submit(_prompt(2, 2))]
    gate.waiting()
    runs += [bench.submit(_prompt(3, 30), base_until=20, adapter=named[name]) for name in ("second", "first", "first")]
    for _ in range(3):  # then both decode
        gate.let()
        gate.waiting()
    load = bench.engine.load
    assert (load.running, load.waiting) == (2, 3)
    assert load.running_adapters == ("running",)
    assert load.waiting_adapters == ("first", "second"), "each once, sorted"
    # Of an adapter's prompt, what comes before its invocation can run now.
    assert load.pending_prefill_tokens == bench.metrics.queued_tokens() == 3 * 20
    gate.open()
    for run in runs:
        run.done()
    bench.settle()
    load = bench.engine.load
    assert (load.running, load.waiting, load.running_adapters, load.waiting_adapters) == (0, 0, (), ())
    assert (bench.metrics.queued_tokens(), load.tail_bytes) == (0, 0)


def test_a_long_prompt_is_cut_and_does_not_hold_up_decoding(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_step_tokens=16)
    gate = Gate(bench.engine)
    talking = bench.submit(_prompt(1, 5), max_tokens=20)
    gate.waiting()
    long = bench.submit(_prompt(2, 50), prefill=True)
    gate.let()
    for _ in range(3):
        assert [len(tokens) for tokens in gate.waiting()] == [1, 15]
        gate.let()
    gate.open()
    long.done()
    talking.done()


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_a_cancelled_sequence_gives_its_place_to_the_next_at_the_next_step(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_sequences=1)
    gate = Gate(bench.engine)
    gone = bench.submit(_prompt(1), max_tokens=50)
    gate.waiting()
    next_run = bench.submit(_prompt(2, 5), max_tokens=1)
    bench.engine.cancel(gone.id)
    gate.let()
    assert gate.waiting() == [_prompt(2, 5)]
    assert (bench.engine.load.running, bench.engine.load.waiting) == (1, 0)
    gate.open()
    next_run.done()
    assert len(gone.tokens) == 1
    assert not gone.ended.is_set()


def test_one_that_waits_can_be_cancelled_too(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_sequences=1)
    gate = Gate(bench.engine)
    running = bench.submit(_prompt(1), max_tokens=2)
    gate.waiting()
    waiting = bench.submit(_prompt(2))
    bench.engine.cancel(waiting.id)
    gate.open()
    running.done()
    bench.settle()
    assert waiting.events == []


def test_what_a_cancelled_prefill_computed_is_kept(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_step_tokens=16)
    gate = Gate(bench.engine)
    gone = bench.submit(_prompt(1, 50), prefill=True)
    gate.waiting()
    bench.engine.cancel(gone.id)
    gate.open()
    bench.settle()
    found = bench.cache.acquire(BlockChain(ROOT, _prompt(1, 50), BLOCK_TOKENS), 50)
    assert found.tokens == 16
    bench.cache.release(found)


def test_a_cancelled_answer_that_there_is_no_memory_to_keep_is_let_go_of_and_the_engine_lives_on(
    bench: Bench, greedy: Callable[..., tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit(_prompt(1), prefill=True).done()
    gate = Gate(bench.engine)
    gone = bench.submit(_prompt(1))
    gate.waiting()
    gate.let()
    gate.waiting()
    with monkeypatch.context() as full, capture_logs() as logs:
        full.setattr(bench.cache, "reserve", lambda *_: 1 / 0)
        bench.engine.cancel(gone.id)
        neighbour = bench.submit((1, 2), prefill=True)
        gate.open()
        assert "ZeroDivisionError" in str(neighbour.error()), "it is the next to need memory"
    assert [line["event"] for line in logs] == ["KV of a cancelled sequence not kept", "step failed"]
    assert len(gone.tokens) >= 1
    assert bench.submit(_prompt(2)).done().generated == greedy(_prompt(2), 6)


def test_cancelling_the_finished_and_the_unknown_does_nothing(bench: Bench) -> None:
    run = bench.submit(_prompt(1))
    run.done()
    bench.engine.cancel(run.id)
    bench.engine.cancel(SequenceId(999))
    bench.settle()


# --- too much ---------------------------------------------------------------------------------------------------------


def test_places_are_bounded_and_say_when_to_come_back(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_sequences=2, max_queue=3)
    held = [bench.engine.place() for _ in range(6)]
    for place in held[:5]:
        place.__enter__()
    with pytest.raises(OverloadedError, match="3 requests wait already") as caught:
        held[5].__enter__()
    assert caught.value.retry_after_seconds is not None
    assert caught.value.retry_after_seconds > 0
    held[0].__exit__(None, None, None)
    with bench.engine.place():
        pass
    for place in held[1:5]:
        place.__exit__(None, None, None)


# --- failing ----------------------------------------------------------------------------------------------------------


def _adapter(model: BaseModel, *, name: str = "a", in_features: int = 64, scale: float = 5.0) -> LoadedAdapter:
    info = AdapterInfo(name, AdapterDigest("d" * 64), "alora", 2, ("q_proj",), (1,), "", 0, resident=True)
    torch.manual_seed(3)
    pair = LoraPair(torch.randn(2, in_features), torch.randn(64, 2), scale)
    return LoadedAdapter(info, {"model.layers.0.self_attn.q_proj": pair, "model.layers.1.self_attn.q_proj": pair})


def test_an_adapter_of_a_wrong_shape_fails_its_sequence_and_the_engine_lives_on(
    make_bench: Callable[..., Bench], greedy: Callable[..., tuple[int, ...]]
) -> None:
    bench = make_bench(max_sequences=1)
    with capture_logs() as logs, structlog.contextvars.bound_contextvars(request_id="bad-1"):
        bad = bench.submit(_prompt(1), adapter=_adapter(bench.model, in_features=63), base_until=12)
        bad.last()
    assert [line["request_ids"] for line in logs if line["event"] == "step failed"] == [["bad-1"]]
    good = bench.submit(_prompt(1))
    error = bad.error()
    assert isinstance(error, StepFailedError)
    assert "engine step failed" in str(error)
    assert good.done().generated == greedy(_prompt(1), 6)
    assert isinstance(bad.events[-1], SequenceFailed)
    assert bad.tokens == ()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1, "top_p": 0.9}, {"top_logprobs": 3}])
def test_an_adapter_whose_numbers_overflow_fails_its_answer_alone(
    make_bench: Callable[..., Bench], greedy: Callable[..., tuple[int, ...]], sampling: dict[str, object]
) -> None:
    bench = make_bench()
    gate = Gate(bench.engine)
    bench.submit(_prompt(3), prefill=True)
    gate.waiting()
    overflowing = bench.submit(_prompt(1), adapter=_adapter(bench.model, scale=1e38), base_until=12, **sampling)
    neighbour = bench.submit(_prompt(2), logprobs=True, top_logprobs=3)
    gate.open()
    error = overflowing.error()
    assert not isinstance(error, StepFailedError), "no other endpoint would fare better"
    assert "no token can be chosen" in str(error)
    assert overflowing.tokens == ()
    assert neighbour.done().generated == greedy(_prompt(2), 6)
    assert bench.submit(_prompt(1)).done().generated == greedy(_prompt(1), 6)


@pytest.mark.parametrize(
    ("raised", "message"),
    [(RuntimeError("broken"), "engine step failed: RuntimeError"), (InvalidRequestError("named"), "named")],
)
def test_a_failing_step_fails_its_sequences_and_no_others(
    make_bench: Callable[..., Bench], greedy: Callable[..., tuple[int, ...]], raised: Exception, message: str
) -> None:
    bench = make_bench(max_sequences=2)
    gate = Gate(bench.engine)
    failing = [bench.submit(_prompt(seed)) for seed in (1, 2)]
    gate.waiting()
    waiting = bench.submit(_prompt(3))
    gate.let()
    gate.waiting()
    gate.let(raised)
    for run in failing[: len(failing)]:
        if len(run.tokens):
            assert message in str(run.error())
    gate.open()
    assert waiting.done().generated == greedy(_prompt(3), 6)
    # What the failed step may have half written is nobody's: the same prompts run right again.
    for seed, run in zip((1, 2), failing, strict=True):
        assert message in str(run.error())
        assert bench.submit(_prompt(seed)).done().generated == greedy(_prompt(seed), 6)


def test_a_step_without_memory_fails_its_sequences_and_no_others(
    bench: Bench, greedy: Callable[..., tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = bench.cache.reserve, []

    def reserve(*args: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError("no room for a segment")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.cache, "reserve", reserve)
    assert "no room for a segment" in str(bench.submit(_prompt(1)).error())
    assert bench.submit(_prompt(1)).done().generated == greedy(_prompt(1), 6)


def test_a_failure_after_a_token_fails_the_sequence_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: Sequence[int]) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr(bench, "model", SimpleNamespace(tokenizer=SimpleNamespace(decode=decode)))
    run = bench.submit(_prompt(1))
    assert "no such token" in str(run.error())
    assert sum(isinstance(event, SequenceFailed) for event in run.events) == 1


def test_who_was_done_before_a_step_failed_stays_done(
    bench: Bench, greedy: Callable[..., tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(bench.engine)
    opener = bench.submit(_prompt(9), max_tokens=1)
    gate.waiting()
    first = bench.submit(_prompt(1), max_tokens=1)
    monkeypatch.setattr(bench, "model", SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda _: 1 / 0)))
    second = bench.submit(_prompt(2))
    gate.let()
    opener.done()
    assert len(gate.waiting()) == 2
    gate.open()
    assert "ZeroDivisionError" in str(second.error())
    assert first.done().generated == greedy(_prompt(1), 1)
    assert isinstance(first.events[-1], SequenceDone)


# --- heartbeats and the end -------------------------------------------------------------------------------------------


def test_silent_sequences_show_that_they_are_alive(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "HEARTBEAT_SECONDS", 0.0)
    bench = make_bench(max_step_tokens=16, max_sequences=1)
    gate = Gate(bench.engine)
    running = bench.submit(_prompt(1, 40), max_tokens=1)
    gate.waiting()
    waiting = bench.submit(_prompt(2), max_tokens=1)
    gate.open()
    running.done()
    waiting.done()
    # Two steps of prompt in silence; the one that waits is in the books from the second on.
    assert sum(isinstance(event, Heartbeat) for event in running.events) == 2
    assert any(isinstance(event, Heartbeat) for event in waiting.events)


def test_talking_sequences_need_no_heartbeat(bench: Bench) -> None:
    run = bench.submit(_prompt(1))
    run.done()
    assert not any(isinstance(event, Heartbeat) for event in run.events)


def test_a_step_that_never_ends_is_seen_from_outside(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pulse, "TIMES_EXPECTED", 1e-9)
    bench.submit(_prompt(1, 200), prefill=True).done()
    gate = Gate(bench.engine)
    held = bench.submit(_prompt(2))
    gate.waiting()
    assert bench.engine.pulse.is_lost
    gate.open()
    held.done()
    bench.settle()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while bench.engine.pulse.is_lost and time.monotonic() < deadline:
        pass
    assert not bench.engine.pulse.is_lost, "it waits for something to do"


def test_closing_fails_what_is_left_and_takes_nothing_more(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_sequences=1)
    gate = Gate(bench.engine)
    running, waiting = bench.submit(_prompt(1)), bench.submit(_prompt(2))
    gate.waiting()
    closer = threading.Thread(target=bench.engine.close)
    closer.start()
    while not bench.engine._closed:
        pass
    with pytest.raises(UnavailableError, match="shutting down"):
        bench.submit(_prompt(3))
    with pytest.raises(UnavailableError, match="shutting down"), bench.engine.place():
        pass
    gate.open()
    closer.join(PATIENCE_SECONDS)
    for run in (running, waiting):
        assert isinstance(run.error(), UnavailableError)
    assert bench.engine.ended.result(0) is None
    bench.engine.close()


def test_a_defect_outside_a_step_is_told_to_whoever_watches(model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = CountingMetrics()
    cache = PrefixCache(model.layout, budget_bytes=1 << 20, device=model.device, metrics=metrics)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(metrics, "load", lambda *_: 1 / 0)
    engine = Engine(model, cache, limits=EngineLimits(), metrics=metrics)
    run = Bench(engine, cache, metrics, model).submit(_prompt(1))
    assert isinstance(engine.ended.exception(PATIENCE_SECONDS), ZeroDivisionError)
    assert isinstance(run.error(), UnavailableError)
    with pytest.raises(UnavailableError):
        Bench(engine, cache, metrics, model).submit(_prompt(1))


def test_an_engine_whose_every_step_fails_ends_and_one_with_a_step_that_succeeds_does_not(
    bench: Bench, greedy: Callable[..., tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU after a fatal error."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    runner = bench.engine._stepper._runner

    def fail(*_: object) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    for _ in range(2):
        with monkeypatch.context() as broken:
            broken.setattr(runner, "forward", fail)
            for _ in range(engine_module.MOST_FAILED_STEPS - 1):
                assert isinstance(bench.submit(_prompt(1)).error(), StepFailedError)
        assert bench.submit(_prompt(1)).done().generated == greedy(_prompt(1), 6)
    monkeypatch.setattr(runner, "forward", fail)
    for _ in range(engine_module.MOST_FAILED_STEPS):
        assert not bench.engine.ended.done()
        assert isinstance(bench.submit(_prompt(1)).error(), StepFailedError)
    assert "device-side assert" in str(bench.engine.ended.exception(PATIENCE_SECONDS))
    with pytest.raises(UnavailableError):
        bench.submit(_prompt(1))


@pytest.mark.parametrize("is_lost", [False, True])
def test_an_engine_that_ends_by_itself_tells_all_it_has_first(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """Those in its batch, in its queue and still unseen; where a lost device gives no memory back, too."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    metrics = CountingMetrics()
    cache = PrefixCache(model.layout, budget_bytes=1 << 20, device=model.device, metrics=metrics)
    engine = Engine(model, cache, limits=EngineLimits(max_sequences=1), metrics=metrics)
    bench, gate, broken = Bench(engine, cache, metrics, model), Gate(engine), RuntimeError("device-side assert")

    def release(*_: object) -> None:
        raise broken

    if is_lost:
        monkeypatch.setattr(cache, "release", release)
    runs = [bench.submit(_prompt(seed)) for seed in range(engine_module.MOST_FAILED_STEPS + 2)]
    for _ in range(engine_module.MOST_FAILED_STEPS - 1):
        gate.waiting()
        gate.let(broken)
    gate.waiting()
    runs += [bench.submit(_prompt(20)), bench.submit(_prompt(21))]
    gate.let(broken)
    assert engine.ended.exception(PATIENCE_SECONDS) is broken
    assert [len(run.events) for run in runs] == [1] * len(runs)
    errors = [type(run.error()) for run in runs]
    assert errors == [StepFailedError] * engine_module.MOST_FAILED_STEPS + [UnavailableError] * 4
    with pytest.raises(UnavailableError), engine.place():
        pass


def test_generated_tokens_of_an_earlier_attempt_stay_generated(
    bench: Bench, greedy: Callable[..., tuple[int, ...]]
) -> None:
    whole = greedy(_prompt(1), 6)
    run = bench.submit(_prompt(1), generated=whole[:4])
    assert run.done().generated == whole
    assert run.tokens == whole[4:]
    assert run.done().stats.generated_tokens == 6


def test_load_tells_how_fast_it_is(bench: Bench) -> None:
    assert bench.engine.load.rates.step_seconds == 0.0
    bench.submit(_prompt(1, 200)).done()
    bench.settle()
    rates = bench.engine.load.rates
    assert rates.step_seconds > 0.0
    assert rates.prefill_tokens_per_second > 0.0
    assert bench.model.vocabulary_size == VOCABULARY


# --- nothing is computed twice ----------------------------------------------------------------------------------------


def _run_tokens(bench: Bench) -> int:
    """Tokens run in all; closes the engine, which counts a step after it has told of its ends."""
    bench.engine.close()
    return bench.metrics.counts["step tokens"]


@pytest.mark.parametrize("count", [20, 24, 37])  # with and without a partial tail
def test_identical_prefills_that_run_together_are_computed_once(make_bench: Callable[..., Bench], count: int) -> None:
    bench = make_bench(max_step_tokens=8)
    gate = Gate(bench.engine)
    runs = [bench.submit(_prompt(1, count), prefill=True) for _ in range(4)]
    gate.open()
    done = [run.done() for run in runs]
    assert _run_tokens(bench) == count
    assert sorted(end.stats.computed_tokens for end in done) == [0, 0, 0, count]


def test_adapters_on_a_prefix_that_nobody_holds_compute_it_once(
    make_bench: Callable[..., Bench], greedy: Callable[..., tuple[int, ...]]
) -> None:
    bench = make_bench(max_step_tokens=8)
    idle = _adapter(bench.model, scale=0.0)
    gate = Gate(bench.engine)
    runs = [bench.submit(_prompt(1), adapter=idle, base_until=17, max_tokens=3) for _ in range(3)]
    gate.open()
    assert [run.done().generated for run in runs] == [greedy(_prompt(1), 3)] * 3
    # 17 base tokens once; three suffix tokens and two generated ones that run, for each.
    assert _run_tokens(bench) == 17 + 3 * (3 + 2)


def test_a_longer_conversation_takes_over_the_blocks_of_a_shorter_one(
    make_bench: Callable[..., Bench], greedy: Callable[..., tuple[int, ...]]
) -> None:
    bench = make_bench(max_step_tokens=8)
    gate = Gate(bench.engine)
    short = bench.submit(_prompt(1, 40)[:24], prefill=True)
    long = bench.submit(_prompt(1, 40), max_tokens=2)
    gate.open()
    short.done()
    assert long.done().generated == greedy(_prompt(1, 40), 2)
    assert _run_tokens(bench) == 40 + 1


def test_who_waits_for_a_neighbour_that_is_cancelled_computes_for_itself(
    make_bench: Callable[..., Bench], greedy: Callable[..., tuple[int, ...]]
) -> None:
    bench = make_bench(max_step_tokens=8)
    gate = Gate(bench.engine)
    first = bench.submit(_prompt(1), prefill=True)
    second = bench.submit(_prompt(1), max_tokens=2)
    gate.waiting()
    gate.let()
    gate.waiting()
    assert first.id is not None
    bench.engine.cancel(first.id)
    gate.open()
    assert second.done().generated == greedy(_prompt(1), 2)
    assert _run_tokens(bench) <= 20 + 1 + 8, "at most the chunk in flight twice"


def test_a_last_token_beside_a_neighbour_that_goes_on_in_the_same_memory_is_computed_right(
    make_bench: Callable[..., Bench],
) -> None:
    """Both read the same slice: one as what others hold, the other as what it has computed so far."""
    prompts = _prompt(1, 40), (*_prompt(1, 8), 9)

    def kv_of_the_second(*wanted: tuple[int, ...]) -> Tensor:
        bench = make_bench(max_step_tokens=8)
        gate = Gate(bench.engine)
        runs = [bench.submit(prompt, prefill=True) for prompt in wanted]
        gate.open()
        for run in runs:
            run.done()
        prefix = bench.cache.acquire(BlockChain(ROOT, prompts[1], BLOCK_TOKENS), 9)
        bench.cache.release(prefix)
        assert [part.tokens for part in prefix.slices] == ([8, 1] if len(wanted) > 1 else [9])
        return torch.cat([part.positions() for part in prefix.slices], dim=3).clone()

    torch.testing.assert_close(kv_of_the_second(*prompts), kv_of_the_second(prompts[1]), atol=1e-5, rtol=0)


def test_blocks_are_told_of_while_the_next_ones_are_computed(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_step_tokens=8)
    run = bench.submit(_prompt(1), prefill=True)
    run.done()
    told = [(event.start, event.end) for event in run.events if isinstance(event, BaseComputed)]
    assert told == [(0, 8), (8, 16), (16, 20)]


def test_a_long_prompt_beside_a_decoding_sequence_runs_in_small_chunks(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_step_tokens=32, max_mixed_step_tokens=4)
    gate = Gate(bench.engine)
    decoding = bench.submit(_prompt(1, 8), max_tokens=9)
    gate.waiting()
    gate.let()
    prompt = bench.submit(_prompt(2, 40), prefill=True)
    chunks = []
    while not prompt.ended.is_set() and not decoding.ended.is_set():
        chunks.append(sorted(len(tokens) for tokens in gate.waiting()))
        gate.let()
        if len(chunks) == 5:
            break
    rate = bench.engine.load.rates.prefill_tokens_per_second
    gate.open()
    prompt.done()
    assert chunks[1:] == [[1, 4]] * 4
    assert rate > 0.0, "an eighth of a step's tokens tell it, beside one that decodes"
    assert decoding.done().generated
