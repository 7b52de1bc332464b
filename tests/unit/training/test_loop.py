"""Training learns, repeats by its seed, goes on after a stop as if there had been none, and sees every row."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from peft import PeftModel

from alora_serve.errors import ConfigError
from alora_serve.training.adapted import AdaptedModel
from alora_serve.training.checkpoint import Checkpoint
from alora_serve.training.encoding import Example
from alora_serve.training.loop import Progress, Trainer, batches, microbatches
from alora_serve.training.prefixes import PrefixOptions
from training_recipes import DEVICES, KINDS, make_recipe

PLENTY = PrefixOptions(torch.float32, 1 << 30)


class Stopped(Exception):
    pass


class Watcher:
    """Counts, and saves and stops where it is told to."""

    def __init__(self, checkpoint: Checkpoint | None = None, trainer: Trainer | None = None, stop_at: int = 0) -> None:
        self.epochs: list[int] = []
        self.checkpoint, self.trainer, self.stop_at = checkpoint, trainer, stop_at

    def on_step(self, progress: Progress, total_steps: int) -> None:
        if progress.step == self.stop_at and self.checkpoint and self.trainer:
            self.checkpoint.save(self.trainer)
            raise Stopped

    def on_epoch(self, progress: Progress, epoch: int) -> None:
        self.epochs.append(epoch)


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters]


@pytest.fixture
def make_trainer(build: Callable[[str], PeftModel], examples: Callable[[str], list[Example]]) -> Callable[..., Trainer]:
    def make(kind: str = "alora", microbatch_tokens: int = 4096, device: str = "cpu", **changes: object) -> Trainer:
        built = build(kind)
        torch.nn.Module.to(built, device)
        model = AdaptedModel(built, examples(kind), PLENTY)
        return Trainer(model, examples(kind), make_recipe(kind, **changes), microbatch_tokens)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_the_same_seed_gives_the_same_weights(
    kind: str, make_trainer: Callable[..., Trainer]
) -> None:
    trainers = [make_trainer(kind, seed=seed) for seed in (3, 3, 4)]
    for trainer in trainers:
        watcher = Watcher()
        trainer.run(watcher)
        assert (trainer.progress.step, watcher.epochs) == (10, [1, 2])
        assert trainer.progress.losses[-1] < trainer.progress.losses[0]
    first, again, other = (weights_of(trainer) for trainer in trainers)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_a_resumed_training_is_the_one_that_was_never_stopped(
    stop_at: int, device: str, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    whole = make_trainer(device=device, dropout=0.2)
    torch.manual_seed(1)
    whole.run(Watcher())
    checkpoint = Checkpoint(tmp_path / "checkpoint", "fingerprint")
    stopped = make_trainer(device=device, dropout=0.2)
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        stopped.run(Watcher(checkpoint, stopped, stop_at))
    resumed = make_trainer(device=device, dropout=0.2)
    assert checkpoint.load(resumed)
    assert resumed.progress.step == stop_at
    resumed.run(Watcher())
    if device == "cuda":  # where gradients may be added up in another order each time; another dropout is far off
        assert resumed.progress.losses == pytest.approx(whole.progress.losses, abs=1e-4)
        return
    assert resumed.progress.losses == whole.progress.losses
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed), weights_of(whole), strict=True))


def test_a_checkpoint_of_something_else_is_refused(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer()
    assert not Checkpoint(tmp_path / "checkpoint", "ours").load(trainer)
    Checkpoint(tmp_path / "checkpoint", "theirs").save(trainer)
    with pytest.raises(ConfigError, match=r"of another recipe, base model or data.*remove"):
        Checkpoint(tmp_path / "checkpoint", "ours").load(trainer)
    (tmp_path / "checkpoint").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"cannot be read.*remove"):
        Checkpoint(tmp_path / "checkpoint", "theirs").load(trainer)


def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    trainer, checkpoint = make_trainer(), Checkpoint(tmp_path / "out" / "checkpoint", "ours")
    checkpoint.save(trainer)

    def killed(*_: object) -> NoReturn:
        raise Stopped

    for move in ("rename", "replace"):
        monkeypatch.setattr(os, move, killed)
    trainer.progress.step = 1
    with pytest.raises(Stopped):
        checkpoint.save(trainer)
    resumed = make_trainer()
    assert checkpoint.load(resumed)
    assert resumed.progress.step == 0
    checkpoint.remove()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_takes_the_same_step(kind: str, make_trainer: Callable[..., Trainer]) -> None:
    whole, parts = make_trainer(kind), make_trainer(kind, microbatch_tokens=60)
    for trainer in (whole, parts):
        trainer.run(Watcher())
    assert whole.progress.losses[0] == pytest.approx(parts.progress.losses[0], abs=1e-5)
    for a, b in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=0)


def example(length: int, target: str) -> Example:
    return Example((1,) * length, (2,), (3, 4), target)


def test_batches_hold_every_example_once() -> None:
    examples = [example(i % 7, str(i)) for i in range(50)]
    for shuffle in (None, random.Random(1)):
        groups = list(batches(examples, 4, shuffle))
        assert sorted(int(e.target) for group in groups for e in group) == list(range(50))
        assert max(map(len, groups)) == 4
    first, second = ([e.target for g in batches(examples, 4, random.Random(s)) for e in g] for s in (1, 2))
    assert first != second


def test_parts_of_a_batch_are_bounded_and_hold_every_example_once() -> None:
    batch = [example(length, str(length)) for length in (50, 3, 7, 90, 1, 20)]
    for reuses in (False, True):
        parts = list(microbatches(batch, 60, reuses_prefixes=reuses))
        assert sorted(int(e.target) for part in parts for e in part) == [1, 3, 7, 20, 50, 90]
        for part in parts:
            widest = max(3 + len(e.base_tokens) / 8 if reuses else e.prompt_tokens + 2 for e in part)
            assert len(part) == 1 or widest * len(part) <= 60
    assert len(list(microbatches(batch, 90, reuses_prefixes=True))) == 1
