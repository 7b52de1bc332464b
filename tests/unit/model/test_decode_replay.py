"""Steps that only decode are replayed from a recording, and answer as if each had been planned anew.

Without a GPU the recording is the computation itself, on the tensors of the step it was made of: what is not carried
over from the new step is missing in its answers, as it would be in a graph's.
"""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from alora_serve.engine.core import CoreOptions
from alora_serve.engine.stepper import EngineLimits
from alora_serve.model import runner
from alora_serve.model.decode_replay import READ_MULTIPLE, DecodeReplay, Replay, decode_replay
from alora_serve.model.device import CPU
from alora_serve.model.kv_memory import KVSlice
from alora_serve.model.lean import LeanForward
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.model.step import Span, Step
from alora_serve.model.tails import TailPool
from alora_serve.types import Prompt
from in_process import Answer, MemoryStore, open_stack
from tiny_models import FAMILIES, save_adapter, save_model

torch.set_num_threads(1)
INVOCATION = (7, 8, 9)
CONVERSATION = tuple(range(20, 60))
NAMES = ("one", "", "two", "plain")
TOKENS = 24


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("replay") / "tiny-llama", FAMILIES["llama"]())


@pytest.fixture(scope="module")
def model(model_directory: Path) -> BaseModel:
    return load_base_model(model_directory, dtype="float32")


@pytest.fixture(scope="module")
def adapters(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "v_proj"]
    for seed, name in enumerate(("one", "two")):
        save_adapter(
            model_directory, root / name, seed=seed, target_modules=targets, alora_invocation_tokens=list(INVOCATION)
        )
    save_adapter(model_directory, root / "plain", seed=5, target_modules=targets)
    return root


@dataclass
class Recorder:
    """Records a computation as itself, and counts."""

    recorded: int = 0
    replayed: int = 0
    replays: list[DecodeReplay] = field(default_factory=list)

    def __call__(self, compute: Replay) -> Replay:
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            return compute()

        return replay

    def make(self, lean: LeanForward | None, device: torch.device) -> DecodeReplay:
        assert lean is not None
        self.replays.append(DecodeReplay(lean, self))
        return self.replays[-1]


async def _answers(model: BaseModel, adapters: Path) -> list[Answer]:
    """Four sequences at once, one of which begins and ends while the others run; then one alone."""
    options = CoreOptions(block_tokens=16, limits=EngineLimits(max_step_tokens=32))
    async with open_stack(model, MemoryStore(), adapters, options=options) as stack:
        prompts = {name: CONVERSATION if name in ("", "plain") else CONVERSATION + INVOCATION for name in NAMES}
        handles = {name: (await stack.prefill(Prompt(token_ids=prompts[name]))).handle for name in NAMES}
        lengths = {"one": TOKENS, "": TOKENS, "two": 5, "plain": 100}  # the last outgrows its first tail
        together = await asyncio.gather(
            *(stack.generate(handles[name], name, max_tokens=lengths[name]) for name in NAMES)
        )
        return [*together, await stack.generate(handles["one"], "one", max_tokens=TOKENS)]


async def test_replayed_steps_answer_as_planned_ones(
    model: BaseModel, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = await _answers(model, adapters)
    recorder = Recorder()
    monkeypatch.setattr(runner, "decode_replay", recorder.make)
    replayed = await _answers(model, adapters)
    assert [answer.tokens for answer in replayed] == [answer.tokens for answer in planned]
    for one, other in zip(replayed, planned, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)
    # Who is in the batch changes a few times; between the changes every step but the first two is a replay.
    assert recorder.recorded >= 3
    assert recorder.replayed > 100


async def test_a_recording_is_let_go_when_others_run(
    model: BaseModel, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the KV of its sequences, which may be evicted meanwhile."""
    recorder = Recorder()
    monkeypatch.setattr(runner, "decode_replay", recorder.make)
    async with open_stack(model, MemoryStore(), adapters) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION + INVOCATION))).handle
        await stack.generate(handle, "one", max_tokens=8)
        assert recorder.recorded == 1
        await stack.prefill(Prompt(token_ids=tuple(range(100, 140))))
        (replay,) = recorder.replays
        assert replay._recording is None


def test_what_a_recording_reads_lives_as_long_as_it(model: BaseModel) -> None:
    """A graph has the addresses of what it was recorded on, and keeps nothing."""
    read: list[weakref.ref[torch.Tensor]] = []

    def lean(step: Step, wanted: torch.Tensor) -> torch.Tensor:
        (tails,) = step.tails
        tensors = (wanted, step.token_ids, step.positions, tails.slots, tails.offsets)
        read[:] = [weakref.ref(tensor) for tensor in tensors]
        return torch.zeros(len(wanted), 1)

    def record(compute: Replay) -> Replay:
        logits = compute()
        return lambda: logits

    replay = DecodeReplay(lean, record)  # type: ignore[arg-type]
    tail = TailPool(model.layout, CPU).take(4, 0)
    for place in range(4):
        step = Step([Span((5,), place, (), KVSlice(tail, 0, place + 1))], CPU, READ_MULTIPLE)
        replay.run(step, torch.tensor([0]), None)
    del step
    assert [reference() is None for reference in read] == [False] * 5
    replay.forget()
    assert [reference() is None for reference in read] == [True] * 5


def test_processors_and_windowed_models_plan_every_step(model: BaseModel, tmp_path: Path) -> None:
    """A launch costs nothing on a processor; and which pieces a windowed layer reads depends on the position."""
    assert decode_replay(model.lean, CPU) is None
    config = FAMILIES["qwen2"]()
    windowed = load_base_model(save_model(tmp_path / "tiny-qwen2", config), dtype="float32")
    assert windowed.lean is not None
    assert windowed.lean.has_windows
    gpu = torch.device("cuda", 0)
    assert decode_replay(windowed.lean, gpu) is None
    assert decode_replay(None, gpu) is None
    assert decode_replay(model.lean, gpu) is not None
