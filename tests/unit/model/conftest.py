"""The demo model's tokenizer, and threads that sleep, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alora_serve.model import threads


@pytest.fixture(scope="session")
def smollm2(demo_model_directory: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_model_directory)
    return tokenizer


@pytest.fixture
def two_sleeping_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch has two threads, which sleep between calls as the launcher has them do."""
    usual = torch.get_num_threads()
    monkeypatch.setattr(threads, "_threads_sleep", True)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)
