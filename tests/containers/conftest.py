"""What the container stage runs on. It skips outside of ``make containers``, which makes images and namespaces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deployment import ServedModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def _in_the_stage() -> None:
    if os.environ.get("ALORA_TEST_CONTAINERS") != "1":
        pytest.skip("runs in make containers")


@pytest.fixture(scope="session")
def served(demo_model_directory: Path) -> ServedModel:
    """What the images' demo model and adapters are, on this side."""
    invocations = {"jailbreak": "<|im_start|>jailbreak<|im_end|>"}
    examples = ROOT / "examples" / "intrinsics"
    return ServedModel(demo_model_directory, (examples,), "jailbreak", "jailbreak", "jailbreak-lora", invocations)
