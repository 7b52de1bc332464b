"""`eval` through real processes: what it counts is what stock PEFT says, cold, about the same rows."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from alora_serve.cli.app import app
from alora_serve.training.encoding import RowEncoder
from alora_serve.training.recipe import Recipe
from alora_serve.training.rows import read_rows
from alora_serve.training.run import RunOptions, train
from deployment import BLOCK_TOKENS, Deployed, ServedModel, deployed, save_tiny_model
from tiny_models import load_peft
from training_recipes import SilentView, make_recipe

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

CHECK = {"learning_rate": 5e-3, "batch_size": 4, "epochs": 4, "invocation": "<|guard|>", "rank": 8}
ROWS = 24
LIKELIEST = 20
TEXTS = ("It is good.", "It is bad.")
"""Tokens that a likelihood looks at."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A model, what was trained on it, and the test rows."""

    model: ServedModel
    recipe: Recipe
    test_file: Path


def write_rows(path: Path) -> Path:
    words = (("good", "yes"), ("bad", "no"))
    rows = [
        {
            "id": f"row-{i}",
            "messages": [{"role": "user", "content": f"Is number {i} in the text? It is {words[i % 2][0]}."}],
            "documents": [{"title": "", "text": f"Numbers are counted up to {i}. " * (i % 4)}] if i % 4 else [],
            "target": words[i % 2][1],
            "source": "short" if i % 4 < 2 else "long",
        }
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_definition(longest_answer_tokens: int) -> str:
    """Of an answer with one field of text; few texts, that a model without training ends what it says."""
    said = {"properties": {"said": {"enum": TEXTS}}, "required": ["said"], "additionalProperties": False}
    parameters = {"max_completion_tokens": longest_answer_tokens}
    form = {"type": "object", **said}
    return json.dumps({"model": None, "response_format": form, "transformations": None, "parameters": parameters})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluated")
    model = save_tiny_model(root)
    rows = write_rows(root / "rows.jsonl")
    recipe = make_recipe(**CHECK)
    options = RunOptions(str(model.directory), [rows], root / "adapters" / "check", dtype="float32")
    train(recipe, options, SilentView())
    for name, longest_answer_tokens in (("text", 64), ("cut-off", 1)):
        shutil.copytree(root / "adapters" / "check", root / "adapters" / name)
        (root / "adapters" / name / "io.yaml").write_text(text_definition(longest_answer_tokens))
    return Trained(model, recipe, rows)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def serving(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployed]:
    store = tmp_path_factory.mktemp("store")
    async with deployed(trained.model, f"lmdb://{store}", block_tokens=str(BLOCK_TOKENS)) as running:
        yield running


async def run(serving: Deployed, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = ["eval", "--address", serving.local.router_address, "--resamples", "50", "--json", *arguments]
    result = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert result.stdout, result.output
    printed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return result.exit_code, printed


def probabilities_of_peft(trained: Trained) -> list[dict[str, float]]:
    """How likely each label is after each whole prompt, of those among the likeliest tokens, by stock PEFT, cold."""
    model = load_peft(trained.model.directory, trained.model.roots[0] / "check")
    encoder = RowEncoder(AutoTokenizer.from_pretrained(trained.model.directory), trained.recipe)
    answers = {label: encoder.answer(label) for label in trained.recipe.labels}
    found = []
    for row in read_rows(trained.test_file):
        example = encoder.encode(row)
        tokens = example.base_tokens + example.cue_tokens + answers["yes"][:1]
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)
        shares = {label: float(probabilities[answer[1]]) for label, answer in answers.items()}
        least = float(probabilities.topk(LIKELIEST).values[-1])
        shares = {label: share for label, share in shares.items() if share >= min(least, max(shares.values()))}
        found.append({label: share / sum(shares.values()) for label, share in shares.items()})
    return found


async def test_what_is_counted_is_what_peft_says(serving: Deployed, trained: Trained, tmp_path: Path) -> None:
    saved = tmp_path / "check.json"
    code, printed = await run(serving, "--adapter", "check", "--data", str(trained.test_file), "--save", str(saved))
    assert code == 0
    expected = await asyncio.to_thread(probabilities_of_peft, trained)
    assert [a["item_id"] for a in printed["answers"]] == [f"row-{i}" for i in range(ROWS)]
    for answer, shares in zip(printed["answers"], expected, strict=True):
        assert answer["probabilities"] == pytest.approx(shares, abs=1e-3)
        assert answer["prediction"] == max(shares, key=lambda label: shares[label])
    right = [answer["prediction"] == ("yes", "no")[i % 2] for i, answer in enumerate(printed["answers"])]
    assert printed["metrics"]["accuracy"]["value"] == pytest.approx(sum(right) / ROWS)
    assert set(printed["metrics"]) == {"accuracy", "macro_f1", "ece"}
    assert printed["majority"] == 0.5
    assert {source: count for source, (_, count) in printed["by_source"].items()} == {"long": 12, "short": 12}
    assert json.loads(saved.read_text())["answers"] == printed["answers"]


async def test_the_base_model_is_asked_by_a_recipe(serving: Deployed, trained: Trained, tmp_path: Path) -> None:
    recipe = tmp_path / "check.toml"
    recipe.write_text('labels = ["yes", "no"]\nlikelihood = { yes = 1.0, no = 0.0 }\nfield = "likelihood"\n')
    flags = ["--recipe", str(recipe), "--data", str(trained.test_file), "--limit", "6"]
    code, printed = await run(serving, *flags, "--instruction", "Yes or no?")
    assert (code, printed["adapter"], printed["items"]) == (0, "", 6)
    assert {answer["prediction"] for answer in printed["answers"]} <= {"yes", "no"}
    assert all(sum(a["probabilities"].values()) == pytest.approx(1) for a in printed["answers"])
    code, printed = await run(serving, *flags)
    assert code == 1
    assert "--instruction" in printed["error"]["message"]


async def test_free_text_is_compared_by_its_words_however_few_texts_there_are(
    serving: Deployed, trained: Trained, tmp_path: Path
) -> None:
    rows = [{**json.loads(line), "target": TEXTS[0]} for line in trained.test_file.read_text().splitlines()[:4]]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, printed = await run(serving, "--adapter", "text", "--data", str(data))
    assert (code, printed["labels"], printed["failed"], printed["majority"]) == (0, [], 0, None)
    assert {answer["form"] for answer in printed["answers"]} == {"text"}
    right = [answer["prediction"] == TEXTS[0] for answer in printed["answers"]]
    assert {answer["prediction"] for answer in printed["answers"]} <= set(TEXTS)
    assert set(printed["metrics"]) == {"rouge_l", "exact_match"}
    assert printed["metrics"]["exact_match"]["value"] == pytest.approx(sum(right) / len(rows))
    assert printed["mean_seconds"] > 0


async def test_answers_that_cannot_be_read_are_counted_and_wrong(serving: Deployed, trained: Trained) -> None:
    code, printed = await run(serving, "--adapter", "cut-off", "--data", str(trained.test_file), "--limit", "4")
    assert (code, printed["failed"], printed["mean_seconds"]) == (0, 4, 0.0)
    assert printed["metrics"]["accuracy"]["value"] == 0.0
    assert "ece" not in printed["metrics"]


async def test_a_missed_threshold_is_an_exit_status(serving: Deployed, trained: Trained) -> None:
    flags = ["--adapter", "check", "--data", str(trained.test_file), "--limit", "4"]
    code, printed = await run(serving, *flags, "--threshold", "accuracy=1.01")
    assert code == 1
    assert printed["missed"][0].endswith("below 1.01")
    code, printed = await run(serving, *flags, "--threshold", "accuracy=0", "--threshold", "ece=1")
    assert (code, printed["missed"]) == (0, [])
    code, printed = await run(serving, *flags, "--threshold", "accuracy")
    assert code == 1
    assert "METRIC=VALUE" in printed["error"]["message"]


async def test_an_adapter_that_is_not_there_is_an_error(serving: Deployed, trained: Trained) -> None:
    code, printed = await run(serving, "--adapter", "nobody", "--data", str(trained.test_file))
    assert code == 1
    assert printed["error"]["reason"] == "ADAPTER_NOT_FOUND"
