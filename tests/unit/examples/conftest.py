"""Loads the example scripts, and a model of a few kilobytes for them to train."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from small_tokenizers import byte_level_tokenizer

INVOCATION = "<|im_start|>question<|im_end|>"


@pytest.fixture(scope="session")
def examples_directory(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.rootpath, "examples")


@pytest.fixture(scope="session")
def training(examples_directory: Path) -> ModuleType:
    """``examples/intrinsic_training.py``."""
    if str(examples_directory) not in sys.path:
        sys.path.append(str(examples_directory))
    return importlib.import_module("intrinsic_training")


@pytest.fixture(scope="session")
def script(training: ModuleType) -> ModuleType:
    """``examples/train_intrinsic.py``, which imports its sibling."""
    return importlib.import_module("train_intrinsic")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_directory(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # wide enough that attention tells tokens apart before any training
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty questions whose answer is in their last word."""
    rows = [
        {"messages": [{"role": "user", "content": f"Number {i} is {word}"}], "target": target}
        for i in range(20)
        for word, target in (("good", "yes"), ("bad", "no"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
