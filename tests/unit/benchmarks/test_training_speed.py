"""The trainings that are timed are one and the same: equal first losses, from whole prompts or from kept KV."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain_peft_training import train
from training_speed import FILES, WAYS, task_of, trained

from small_tokenizers import CHATML, byte_level_tokenizer
from tiny_models import FAMILIES, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = byte_level_tokenizer(CHATML)
    config = FAMILIES["llama"]()
    config.vocab_size = len(tokenizer)
    save_model(directory, config)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.timeout(300)
def test_all_ways_train_the_same(model: Path) -> None:
    task = task_of(FILES["short"], model, rows=6, epochs=1, dtype="float32")
    runs = [trained(way, task) for way in WAYS]
    assert runs[0].first_loss > 1.0
    assert all(run.first_loss == pytest.approx(runs[0].first_loss, abs=1e-4) for run in runs)
    assert all(run.cpu_seconds > 0 for run in runs)


def test_a_batch_in_parts_is_the_batch(model: Path) -> None:
    rows = [[[*range(5, 5 + length), 70, 71], [40 + length, 3]] for length in (3, 9, 4)]
    given = {"model": str(model), "dtype": "float32", "threads": 1, "rank": 4, "alpha": 8, "targets": ["q_proj"]}
    given |= {"invocation": [70, 71], "learning_rate": 1e-3, "weight_decay": 0.0}
    whole, parts = (train({**given, "batches": [batch] * 3})["losses"] for batch in ([rows], [rows[:1], rows[1:]]))
    assert whole == pytest.approx(parts, abs=1e-5)
    assert whole[2] < whole[0]
