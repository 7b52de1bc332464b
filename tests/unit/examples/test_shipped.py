"""What the repository ships: two adapters that stock PEFT loads, their data, and a conversation they judge rightly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTERS = ("jailbreak", "jailbreak-lora")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_prompt(row: dict[str, Any]) -> str:
    return str(next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_small_and_says_where_it_comes_from(name: str, examples_directory: Path) -> None:
    directory = examples_directory / "intrinsics" / name
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert bool(config["alora_invocation_tokens"]) == (name == "jailbreak")
    weights = load_file(directory / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (directory / "adapter_model.safetensors").stat().st_size < 4 << 20
    card = (directory / "README.md").read_text()
    for fact in ("examples/data/README.md", "Apache-2.0", "steps |", "| test.jsonl |"):
        assert fact in card


@pytest.mark.parametrize("suffix", ["", "_context"])
def test_no_prompt_is_in_both_training_and_test_data(suffix: str, examples_directory: Path) -> None:
    data = examples_directory / "data" / "jailbreak"
    test = rows_of(data / f"test{suffix}.jsonl")
    assert [row["target"] for row in test].count("yes") * 2 == len(test)
    for kind in ("train", "train_context"):
        train = {last_prompt(row) for row in rows_of(data / f"{kind}.jsonl")}
        assert not [row["id"] for row in test if last_prompt(row) in train]


def test_the_context_rows_are_what_their_script_makes(examples_directory: Path, tmp_path: Path) -> None:
    copied = tmp_path / "data"
    shutil.copytree(examples_directory / "data", copied)
    originals = {path.name: path.read_bytes() for path in (copied / "jailbreak").glob("*_context.jsonl")}
    for name in originals:
        (copied / "jailbreak" / name).unlink()
    subprocess.run([sys.executable, str(copied / "jailbreak" / "make_context_rows.py")], check=True)
    assert sorted(originals) == ["test_context.jsonl", "train_context.jsonl"]
    for name, content in originals.items():
        assert (copied / "jailbreak" / name).read_bytes() == content


def test_the_adapter_judges_the_demo_conversation_rightly(examples_directory: Path, demo_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_directory)
    base = AutoModelForCausalLM.from_pretrained(demo_model_directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(examples_directory / "intrinsics" / "jailbreak")).eval()
    invocation = model.peft_config["default"].alora_invocation_tokens
    assert tokenizer.decode(invocation) == "<|im_start|>jailbreak<|im_end|>"
    conversation = json.loads((examples_directory / "demo_conversation.json").read_text(encoding="utf-8"))
    first, second = conversation["turns"]
    messages = [
        {"role": "user", "content": f"{conversation['document']}\n\n{first['user']}"},
        {"role": "assistant", "content": "It was built by Richard Trevithick in 1804."},
        {"role": "user", "content": second["user"]},
    ]
    for turns, expected in ((1, first["jailbreak"]), (3, second["jailbreak"])):
        prompt = [*tokenizer.apply_chat_template(messages[:turns], return_dict=False), *invocation]
        with torch.inference_mode():
            answer = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=4)
        assert tokenizer.decode(answer[0, len(prompt) :]) == f"{expected}<|im_end|>"
