"""Systems that need no server, on a tiny model: real processes, asked as the benchmarks ask them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from io import StringIO

import pytest
import pytest_asyncio
from adapters import ensure_adapters
from conversations import Renderer
from correctness import Answers, with_verdicts
from harness import Correct
from lineup import Bench
from rich.console import Console
from rich.progress import Progress
from scenarios import cold_worker, fan_out
from systems.base import System
from systems.engine import EngineInProcess
from systems.peft import PeftAlora, PeftLora
from systems.peft_settings import PeftSettings
from systems.step_timers import PARTS, PREFILL, REST, WHOLE

from alora_serve.model.tails import FIRST_TAIL_TOKENS
from tiny_models import FAMILIES, save_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = 800


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 2
    config.max_position_embeddings = 1024  # its tokens are bytes
    model = save_model(tmp_path_factory.mktemp("bench") / "tiny-llama", config)
    adapters = ensure_adapters(model, tmp_path_factory.mktemp("adapters"), count=2)
    console = Console(file=StringIO())
    return Bench(console, Progress(console=console), model, "float32", adapters, Renderer(model))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def systems(bench: Bench) -> AsyncIterator[dict[str, System]]:
    async with bench.systems(["engine", "peft-alora", "peft-lora"]) as running:
        yield running


async def test_a_fan_out_is_measured_and_its_answers_are_those_of_cold_peft(
    bench: Bench, systems: dict[str, System]
) -> None:
    plan = fan_out.Plan(tokens=(TOKENS,), adapters=(2,), rounds=1, answer_tokens=4)

    rows = await fan_out.run(bench, systems, plan)
    rows = with_verdicts(rows, await bench.answers.judge(bench.model, bench.dtype, bench.progress))

    assert [row.system for row in rows] == [system.name for system in systems.values()]
    for row in rows:
        assert row.correct is not None
        assert (row.correct.equal, row.correct.of) == (2, 2)
        [sample] = row.samples
        assert 0 < sample.first_token_seconds < sample.total_seconds
    for name in systems:
        facts = bench.processes[name]
        assert facts["torch_threads"] >= 1
        assert ("OMP_WAIT_POLICY" in facts["environment"]) is (name == "engine"), "PEFT's threads may spin"
    measured = {row.system for row in rows if "prefill_tokens_per_second" in row.details}
    assert measured == {systems["engine"].name, systems["peft-alora"].name}


@pytest.mark.parametrize(
    "settings", [PeftSettings(batched=True), PeftSettings(batched=False)], ids=["one batch", "one after another"]
)
@pytest.mark.parametrize("kind", [PeftLora, PeftAlora])
async def test_pefts_answers_are_those_of_cold_peft_however_a_fan_out_is_asked(
    bench: Bench, kind: type[PeftLora], settings: PeftSettings
) -> None:
    prefix, answers = bench.renderer.of_length(TOKENS, seed=3), Answers()
    key = ("peft", "2 adapters", TOKENS, 2)

    async with kind(bench.model, "float32", bench.adapters, settings=settings) as peft:
        await peft.warm(prefix)
        found = await peft.fan_out(prefix, bench.adapters, 4)
        for adapter, answer in zip(bench.adapters, found.answers, strict=True):
            answers.keep(key, peft, prefix, adapter, answer)

    assert len({len(adapter.invocation) for adapter in bench.adapters}) == 2, "a batch is padded"
    first, second = (answer.first_token_seconds for answer in found.answers)
    assert (first == second) is settings.batched
    assert found.total_seconds == found.answers[1].total_seconds
    assert await answers.judge(bench.model, "float32", bench.progress) == {key: Correct(2, 2, "float32")}


async def test_peers_compute_the_conversation_after_their_restart(bench: Bench) -> None:
    plan = cold_worker.Plan(tokens=TOKENS, rounds=1, answer_tokens=4)

    rows = await cold_worker.run(bench, plan, ["peft-lora", "peft-alora"])
    rows = with_verdicts(rows, await bench.answers.judge(bench.model, bench.dtype, bench.progress))

    assert [row.system for row in rows] == [PeftLora.name, PeftAlora.name]
    assert [row.correct for row in rows] == [Correct(1, 1, "float32")] * 2


async def test_the_memory_of_sixteen_sequences_is_one_conversation_and_sixteen_tails(
    bench: Bench, systems: dict[str, System]
) -> None:
    engine = systems["engine"]
    assert isinstance(engine, EngineInProcess)

    one, sixteen = [
        await engine.memory(bench.renderer.of_length(TOKENS, seed=count), bench.adapters[:1] * count, 48)
        for count in (1, 16)
    ]

    # No room that the conversation's memory keeps beyond its tokens: that would make the ratio smaller.
    conversation_bytes = TOKENS * one.kv_bytes_per_token
    tail_bytes = one.size_bytes - conversation_bytes
    assert tail_bytes in {size * FIRST_TAIL_TOKENS * one.kv_bytes_per_token for size in (1, 2)}
    assert sixteen.size_bytes == conversation_bytes + 16 * tail_bytes


async def test_the_parts_of_a_step_are_timed_and_come_to_the_step(bench: Bench, systems: dict[str, System]) -> None:
    engine = systems["engine"]
    assert isinstance(engine, EngineInProcess)

    found = await engine.profile(bench.renderer.of_length(TOKENS, seed=1), bench.adapters, 16)

    whole = found.pop(WHOLE)
    of_prompts = {kind for kind, _, method in PARTS if method == "_causal"}
    assert set(found) == {kind for kind, _, _ in PARTS} - of_prompts | {REST}
    assert all(min(seconds) > 0 for seconds in found.values())
    assert [sum(parts) for parts in zip(*found.values(), strict=True)] == pytest.approx(whole)


async def test_the_parts_of_a_prefill_are_timed_over_all_its_steps(bench: Bench, systems: dict[str, System]) -> None:
    engine = systems["engine"]
    assert isinstance(engine, EngineInProcess)

    # More than a step's worth: its second chunk attends to the first.
    found = await engine.profile_prefill(bench.renderer.of_length(300, seed=4))

    whole = found.pop(PREFILL)
    of_answers = {kind for kind, _, method in PARTS if method in ("_tails", "add_deltas")}
    assert set(found) == {kind for kind, _, _ in PARTS} - of_answers | {REST}
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(whole)


async def test_a_step_is_timed_with_and_without_adapters(bench: Bench, systems: dict[str, System]) -> None:
    engine = systems["engine"]
    assert isinstance(engine, EngineInProcess)

    assert await engine.step_seconds(bench.renderer.of_length(TOKENS, seed=1), [*bench.adapters, None], 16) > 0
