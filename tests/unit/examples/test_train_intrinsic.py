"""The script's result is a stock PEFT directory that says how it was made and names no path of the machine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

INVOCATION = "<|im_start|>question<|im_end|>"


def arguments(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    settings = {
        "--model": model,
        "--train": rows,
        "--test": rows,
        "--output": output,
        "--threads": 1,
        "--epochs": 15,
        "--batch-size": 8,
        "--lr": 2e-2,
        "--rank": 8,
        "--validation-fraction": 0.2,
    }
    return [*(str(part) for setting in settings.items() for part in setting), *more]


def test_an_activated_adapter_is_trained_and_saved(
    script: ModuleType,
    training: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    tiny_model_directory: Path,
    rows_file: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "goodness"
    note = tmp_path / "note.md"
    note.write_text("Made for a test.\n")
    more = ("--invocation", INVOCATION, "--card-note", str(note), "--base-instruction", "Is it good?")
    script.main(arguments(tiny_model_directory, rows_file, output, *more))

    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    invocation = list(tokenizer.encode(INVOCATION, add_special_tokens=False))
    assert config["alora_invocation_tokens"] == invocation
    assert {tensor.dtype for tensor in load_file(output / "adapter_model.safetensors").values()} == {torch.bfloat16}
    card = (output / "README.md").read_text()
    assert "Made for a test." in card
    assert r"| invocation | `<\|im_start\|>question<\|im_end\|>` |" in card
    assert "32 (rows.jsonl)" in card
    assert [line.split("|")[2].strip() for line in card.splitlines() if line.startswith("| rows.jsonl |")] == [
        "alora",
        "base, same prompt",
        "base, asked in words",
    ]
    for written in output.iterdir():
        assert str(tmp_path).encode() not in written.read_bytes(), written

    base = AutoModelForCausalLM.from_pretrained(tiny_model_directory)
    model = PeftModel.from_pretrained(base, str(output))
    scorer = training.Scorer(model.eval(), tokenizer, 1 << 30)
    examples = [training.encode(tokenizer, row, invocation) for row in training.read_rows(rows_file)]
    measured = training.accuracy(scorer, examples, ["no", "yes"], 8)
    assert f"| alora | {measured} |" in card
    assert measured.correct >= 36
    with model.disable_adapter():
        base_measured = training.accuracy(scorer, examples, ["no", "yes"], 8)
    assert f"| base, same prompt | {base_measured} |" in card
    assert base_measured.correct < 36


def test_a_plain_twin_has_no_invocation(
    script: ModuleType, tiny_model_directory: Path, rows_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "goodness-lora"
    more = ("--kind", "lora", "--validation-fraction", "0", "--limit", "16", "--base-name", "named")
    script.main(arguments(tiny_model_directory, rows_file, output, *more))
    config = json.loads((output / "adapter_config.json").read_text())
    assert not config["alora_invocation_tokens"]
    assert config["base_model_name_or_path"] == "named"
    card = (output / "README.md").read_text()
    assert "A plain LoRA adapter for named." in card
    assert "none kept" in card
    assert "16 (rows.jsonl)" in card


def test_rows_beyond_the_longest_prompt_are_left_out(
    script: ModuleType, tiny_model_directory: Path, rows_file: Path, tmp_path: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "long " * 200}], "target": "yes"}
    rows_file.write_text(rows_file.read_text() + json.dumps(long) + "\n")
    more = ("--epochs", "1", "--validation-fraction", "0", "--max-tokens", "100")
    script.main(arguments(tiny_model_directory, rows_file, tmp_path / "out", *more))
    assert "40 (rows.jsonl)" in (tmp_path / "out" / "README.md").read_text()


def test_free_text_targets_are_refused(
    script: ModuleType, tiny_model_directory: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) | {"target": str(i)} for i, line in enumerate(rows_file.read_text().splitlines())]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="2 to 20 different targets can be scored, found 40"):
        script.main(arguments(tiny_model_directory, rows_file, tmp_path / "out"))


def test_a_question_is_never_on_both_sides_of_the_split(script: ModuleType, training: ModuleType) -> None:
    def row(text: str, earlier: int) -> object:
        context = [{"role": "user", "content": str(earlier)}, {"role": "assistant", "content": "Yes."}]
        return training.Row([*context, {"role": "user", "content": text}], [], "yes")

    rows = [row(f"question {i % 30}", i) for i in range(90)]
    train, validation = script.split_rows(rows, 0.2, seed=1)
    assert (len(train), len(validation)) == (72, 18)
    asked = [{r.messages[-1]["content"] for r in side} for side in (train, validation)]
    assert not asked[0] & asked[1]
    assert script.split_rows(rows, 0.2, seed=1) == (train, validation)
    assert script.split_rows(rows, 0.2, seed=2) != (train, validation)


def test_the_commands_in_the_readme_are_understood(script: ModuleType, examples_directory: Path) -> None:
    text = (examples_directory / "README.md").read_text().replace("\\\n", "")
    commands = [line.partition("train_intrinsic.py ")[2] for line in text.splitlines() if line.startswith("$ python")]
    parsed = [script.parse_arguments(shlex.split(command)) for command in commands]
    assert [arguments.kind for arguments in parsed] == ["alora", "alora", "lora"]
    for arguments in parsed[1:]:
        for path in (*arguments.train, *arguments.test, arguments.card_note, arguments.output):
            assert (examples_directory.parent / path).exists()
