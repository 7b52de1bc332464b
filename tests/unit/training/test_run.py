"""From files to files: what `train` writes is a stock PEFT directory that did what its card says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from alora_serve.cli.app import app
from alora_serve.errors import ConfigError
from alora_serve.training.judging import LabelTokens
from alora_serve.training.run import RunOptions, train, validate
from training_recipes import KINDS, SilentView, make_recipe


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_is_loaded_by_stock_peft_and_says_how_it_was_made(
    kind: str, tiny_model_directory: Path, rows_file: Path, tmp_path: Path
) -> None:
    options = RunOptions(str(tiny_model_directory), [rows_file], tmp_path / "out", dtype="float32")
    result = train(make_recipe(kind, epochs=6, note="From nowhere."), options, SilentView())
    assert result.trained.validation[-1]["accuracy"] > 0.7
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "io.yaml", "training.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in (*(tmp_path / "out").iterdir(), tmp_path / "plain")}
    assert set(modes.values()) == {modes["plain"]}, "a service's user reads all of them"
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert bool(config["alora_invocation_tokens"]) == (kind == "alora")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_directory), tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "io.yaml").read_text())["response_format"]
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "From nowhere.",
        "| rank, alpha, targets | 4, 16,",
        "36 to train, 4 to validate",
        "seed 0",
        "accuracy",
    ):
        assert fact in card
    assert (r"<\|im_start\|>question<\|im_end\|>" in card) == (kind == "alora")


def test_a_stopped_run_goes_on_and_ends_where_an_unstopped_one_does(
    tiny_model_directory: Path, rows_file: Path, tmp_path: Path
) -> None:
    recipe = make_recipe()

    def run(output: str, view: SilentView) -> Path:
        data, directory = [rows_file], tmp_path / output
        train(recipe, RunOptions(str(tiny_model_directory), data, directory, checkpoint_seconds=0.0), view)
        return directory

    whole = run("whole", SilentView())
    with pytest.raises(KeyboardInterrupt):
        run("stopped", SilentView(stop_at=7))
    view = SilentView()
    resumed = run("stopped", view)
    assert view.steps[0] == 7  # the sixth was the last one kept
    for name in ("adapter_model.safetensors", "adapter_config.json", "io.yaml"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_is_stopped_while_it_validates_loses_no_epochs_figures(
    epoch: int, tiny_model_directory: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: str) -> tuple[list[Any], list[float]]:
        options = RunOptions(str(tiny_model_directory), [rows_file], tmp_path / output, checkpoint_seconds=0.0)
        train(make_recipe(epochs=2), options, SilentView())
        told: dict[str, Any] = json.loads((tmp_path / output / "training.json").read_text())
        return told["trained"]["validation"], told["losses"]

    left = [epoch]

    def stopping(*arguments: Any) -> dict[str, float]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return validate(*arguments)

    whole = run("whole")
    monkeypatch.setattr("alora_serve.training.run.validate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    assert run("stopped") == whole


def test_a_limit_takes_the_first_rows_that_are_short_enough_and_the_others_are_counted(
    tiny_model_directory: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = rows_file.read_text().splitlines(keepends=True)
    long = [row.replace("Number", "Number " * 40) for row in rows]
    written = {}
    for name, lines, limit in (("eight", rows[:8], None), ("limited", [*long[:3], *rows], 8)):
        data, view = tmp_path / f"{name}.jsonl", SilentView()
        data.write_text("".join(lines))
        recipe = make_recipe(epochs=1, validation_fraction=0.0, max_tokens=100, limit=limit)
        result = train(recipe, RunOptions(str(tiny_model_directory), [data], tmp_path / name), view)
        assert result.trained.rows == 8
        written[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        told = [note for note in view.notes if "left out" in note]
        card = (tmp_path / name / "README.md").read_text()
        too_long = json.loads((tmp_path / name / "training.json").read_text())["trained"]["too_long"]
        if limit:
            assert (told, too_long) == (["3 rows left out: their prompts have more than 100 tokens"], 3)
            assert "8 to train, 0 to validate, 3 left out as too long (limited.jsonl)" in card
        else:
            assert (told, too_long) == ([], 0)
            assert "left out" not in card
    assert written["limited"] == written["eight"]


def test_nothing_to_train_on_is_an_error(tiny_model_directory: Path, rows_file: Path, tmp_path: Path) -> None:
    options = RunOptions(str(tiny_model_directory), [rows_file], tmp_path / "out")
    with pytest.raises(ConfigError, match="no row to train on: 40 were read"):
        train(make_recipe(max_tokens=8), options, SilentView())


def test_labels_that_begin_alike_cannot_be_told_apart() -> None:
    assert LabelTokens.of([(1, 2, 3), (1, 4)]) == LabelTokens((1,), (2, 4))
    with pytest.raises(ConfigError, match="told apart"):
        LabelTokens.of([(1, 2, 3), (1, 2, 4), (1, 5)])


def test_the_command_trains_free_text(tiny_model_directory: Path, rows_file: Path, tmp_path: Path) -> None:
    flags = ["--data", str(rows_file), "--output", str(tmp_path / "out"), "--model", str(tiny_model_directory)]
    flags += ["--field", "verdict", "--epochs", "1", "--targets", "q_proj,v_proj", "--seed", "3", "--json"]
    result = CliRunner().invoke(app, ["train", *flags])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trained"]["steps"] == 5
    assert "36 rows to train, 4 to validate" in result.stderr
    bar = result.stderr.splitlines()[-1]
    assert re.search(r"^loss \d+\.\d{3} .* 5/5 .* left \d+:\d\d", bar), "the loss, the steps and the time left"
    assert "`verdict`" in (tmp_path / "out" / "README.md").read_text()
    refused = CliRunner().invoke(app, ["train", *flags, "--rank", "0"])
    assert refused.exit_code == 1
    assert "rank" in json.loads(refused.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--dtype", ["auto", "float32", "bfloat16"]),
        ("--save-dtype", ["float32", "bfloat16"]),
        ("--prefix-dtype", ["auto", "float32", "bfloat16"]),
    ],
)
def test_a_dtype_that_is_none_is_refused_before_anything_is_read(
    option: str, choices: list[str], rows_file: Path, tmp_path: Path
) -> None:
    flags = ["--data", str(rows_file), "--output", str(tmp_path / "out"), "--model", str(tmp_path / "nowhere")]
    refused = CliRunner().invoke(app, ["train", *flags, option, "bf16"])
    assert refused.exit_code == 2
    assert option in refused.stderr
    assert re.findall(r"'(\w+)'", refused.stderr) == ["bf16", *choices]
    assert not (tmp_path / "out").exists()
