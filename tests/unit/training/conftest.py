"""A model of a few kilobytes to train, its tokenizer, and questions that it can learn to answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from alora_serve.training.encoding import Example, RowEncoder
from alora_serve.training.rows import Row, read_rows
from alora_serve.training.saving import new_adapter
from alora_serve.types import ChatMessage
from small_tokenizers import DEFAULT_SYSTEM, byte_level_tokenizer
from training_recipes import make_recipe


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_level_tokenizer(DEFAULT_SYSTEM)
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


@pytest.fixture
def rows(rows_file: Path) -> list[Row]:
    """The forty; every third one is a longer conversation, every other third longer still."""
    turns = [(ChatMessage("user", "Hi " * i), ChatMessage("assistant", "Yes")) * (i % 3) for i in range(40)]
    return [
        Row(before + row.messages, row.documents, row.target, row.row_id)
        for before, row in zip(turns, read_rows(rows_file), strict=True)
    ]


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> Callable[[str], list[Example]]:
    """The rows as the kind wants them."""

    def encode(kind: str) -> list[Example]:
        encoder = RowEncoder(tokenizer, make_recipe(kind))
        return [encoder.encode(row) for row in rows]

    return encode


@pytest.fixture
def build(tiny_model_directory: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PeftModel]:
    """A model with an adapter that does something already: PEFT starts with a zero matrix."""

    def make(kind: str) -> PeftModel:
        recipe = make_recipe(kind, seed=2)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_directory, dtype=torch.float32)
        model = new_adapter(base, recipe, RowEncoder(tokenizer, recipe).invocation_tokens)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make
