"""One tiny model with two adapters, and quiet logs, for all tests of the engine's parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from alora_serve.model.loader import BaseModel, load_base_model
from tiny_models import FAMILIES, save_adapter, save_model

torch.set_num_threads(1)

GENERATION_PROMPT = (256, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198)  # <|start|>assistant\n
INVOCATIONS = {
    "appended": (258, 10, 258),
    "generation-prompt": GENERATION_PROMPT,
    "inside-generation-prompt": GENERATION_PROMPT[-3:],
    "across-the-edge": (257, 198, *GENERATION_PROMPT[:2]),  # a turn's end and the beginning of the next
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 2
    return save_model(tmp_path_factory.mktemp("engine") / "tiny-llama", config)


@pytest.fixture(scope="session")
def model(model_directory: Path) -> BaseModel:
    return load_base_model(model_directory, dtype="float32")


@pytest.fixture(scope="session")
def adapters(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """aLoRAs named by where their invocation falls in a conversation, and one plain LoRA."""
    root = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "k_proj", "v_proj"]
    for seed, (name, invocation) in enumerate(INVOCATIONS.items()):
        save_adapter(
            model_directory, root / name, seed=seed, target_modules=targets, alora_invocation_tokens=list(invocation)
        )
    save_adapter(model_directory, root / "lora", seed=9, target_modules=targets)
    return root
