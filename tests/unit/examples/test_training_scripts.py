"""The scripts that make the intrinsics: what runs, in which order, what is shipped; how an answer is scored."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from alora_serve.model.chat import ChatTokenizer
from alora_serve.training.recipe import load_recipe
from alora_serve.types import ChatMessage, Document, Prompt
from small_tokenizers import CHATML, TOOLS, byte_level_tokenizer
from tiny_models import FAMILIES, save_model


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_intrinsics(pytestconfig: pytest.Config) -> ModuleType:
    return load_script(pytestconfig.rootpath / "examples" / "train_intrinsics.py")


@pytest.fixture(scope="module")
def prepare_uncertainty(pytestconfig: pytest.Config) -> ModuleType:
    return load_script(pytestconfig.rootpath / "examples" / "prepare_uncertainty.py")


@pytest.fixture(scope="module")
def prepare_query_rewrite(pytestconfig: pytest.Config) -> ModuleType:
    return load_script(pytestconfig.rootpath / "examples" / "prepare_query_rewrite.py")


@pytest.mark.parametrize("name", ["prepare_uncertainty", "prepare_query_rewrite", "data/jailbreak/make_context_rows"])
def test_a_line_of_rows_ends_where_jsonl_says_so(name: str, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Line ends that are Unicode's alone may stand in JSON as they are."""
    script = load_script(pytestconfig.rootpath / "examples" / f"{name}.py")
    rows = [{"text": "\u2028 \u2029 \x85"}, {"text": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    assert script.read_lines(path) == rows


def test_every_third_conversation_gets_documents_that_do_not_change_what_is_said(
    prepare_query_rewrite: ModuleType, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}], "documents": [], "target": f"the {i}th?"}
        for i in range(30)
    ]
    (tmp_path / "query_rewrite").mkdir()
    (tmp_path / "query_rewrite" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    for output in (tmp_path / "one", tmp_path / "two"):
        prepare_query_rewrite.main(["--data", str(tmp_path), "--output", str(output)])
        made.append((output / "train.jsonl").read_text())
    assert made[0] == made[1]
    written = [json.loads(line) for line in made[0].splitlines()]
    assert [{**row, "documents": []} for row in written] == rows
    assert [bool(row["documents"]) for row in written] == [i % 3 == 0 for i in range(30)]
    assert {len(row["documents"]) for row in written} == {0, 1, 2}
    assert all(document["text"] for row in written for document in row["documents"])


def test_every_task_has_a_recipe_that_serves_both_kinds(train_intrinsics: ModuleType) -> None:
    assert {path.stem for path in train_intrinsics.RECIPES.glob("*.toml")} == set(train_intrinsics.TASKS)
    for task in train_intrinsics.TASKS:
        recipe = load_recipe(train_intrinsics.RECIPES / f"{task}.toml", {})
        assert recipe.name == task
        assert recipe.invocation is not None
        assert recipe.invocation.startswith("<|im_start|>")
        assert recipe.invocation.endswith("<|im_end|>")
        assert load_recipe(train_intrinsics.RECIPES / f"{task}.toml", {"kind": "lora"}).invocation is None
    assert len({load_recipe(path, {}).invocation for path in train_intrinsics.RECIPES.glob("*.toml")}) == 5


def test_all_is_trained_once_and_the_first_seed_is_shipped_whatever_others_reached(
    train_intrinsics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES["llama"]()
    config.max_position_embeddings = 2048
    model = save_model(tmp_path / "tiny", config)
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "target": "yes" if i % 2 else "no"} for i in range(20)]
    (tmp_path / "data" / "jailbreak").mkdir(parents=True)
    (tmp_path / "data" / "jailbreak" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_intrinsics, "SHIPPED", tmp_path / "shipped")
    flags = ["--only", "jailbreak", "--seeds", "0", "--kinds", "alora", "--data", str(tmp_path / "data")]
    state = tmp_path / "build" / "intrinsics"
    train_flags = ["--train-flags", "--model", str(model), "--epochs", "1", "--rank", "2", "--threads", "1"]
    train_intrinsics.main([*flags, *train_flags])
    assert {path.name for path in state.iterdir()} == {"jailbreak-alora-0", "prefixes"}
    assert list((state / "prefixes").iterdir()) == []
    monkeypatch.setattr(train_intrinsics, "train", lambda run, arguments: pytest.fail("trained again"))
    train_intrinsics.main([*flags, *train_flags])

    (state / "jailbreak-alora-0" / "README.md").write_text("of seed 0")
    better = shutil.copytree(state / "jailbreak-alora-0", state / "jailbreak-alora-1")
    done = json.loads((better / "training.json").read_text())
    done["trained"]["validation"][-1]["loss"] = -1.0
    (better / "training.json").write_text(json.dumps(done))
    (better / "README.md").write_text("of seed 1")
    train_intrinsics.main(["--only", "jailbreak", "--kinds", "alora", "--ship"])
    shipped = tmp_path / "shipped" / "jailbreak"
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "io.yaml"}
    assert {path.name for path in shipped.iterdir()} == names
    assert (shipped / "README.md").read_text() == "of seed 0"


def test_missing_rows_are_an_error(
    train_intrinsics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for task, advice in (("jailbreak", "--data"), ("uncertainty", "prepare_uncertainty")):
        with pytest.raises(SystemExit, match=advice):
            train_intrinsics.main(["--only", task, "--seeds", "0", "--data", str(tmp_path)])


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("It is the Eiffel Tower.", ["Eiffel tower"], 1.0),
        ("in 1804", ["1805", "1804"], 1.0),
        ("in 18045", ["1804"], 0.0),
        ("John Smith", ["John Adams"], 0.5),
        ("", ["x"], 0.0),
        ("a the", ["the"], 0.0),
    ],
)
def test_an_answer_is_scored_as_squad_does(
    answer: str, gold: list[str], expected: float, prepare_uncertainty: ModuleType
) -> None:
    assert prepare_uncertainty.score(answer, gold) == pytest.approx(expected)


def test_documents_stand_where_the_services_put_them(prepare_uncertainty: ModuleType) -> None:
    conversation = Prompt(messages=(ChatMessage("user", "Why?"),), documents=(Document("T", "Because."),))
    shown = {}
    for template in (CHATML, TOOLS):
        tokenizer = ChatTokenizer(byte_level_tokenizer(template))
        shown[template] = tokenizer.spell(prepare_uncertainty.prompt_tokens(tokenizer, conversation))
    assert "user\nYou have access to the following documents:\n\n[Document 1]\nBecause.<|im_end|>" in shown[CHATML]
    assert shown[TOOLS].startswith("<|im_start|>documents\nT: Because.\n<|im_end|>")
    assert "You have access" not in shown[TOOLS]


def test_the_models_answers_become_rows_and_a_stopped_run_goes_on(
    prepare_uncertainty: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "tiny", FAMILIES["llama"]())
    source = tmp_path / "data" / "uncertainty"
    source.mkdir(parents=True)
    records = [
        {
            "id": f"q{i}",
            "source": "made",
            "messages": [{"role": "user", "content": f"What is {i}?"}],
            "documents": [{"title": "", "text": "Numbers."}] if i % 2 else [],
            "target": {"question": "", "answers": ["nothing"]},
        }
        for i in range(6)
    ]
    for name in ("train.jsonl", "test.jsonl"):
        (source / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "out"
    flags = ["--data", str(tmp_path / "data"), "--output", str(output), "--model", str(model), "--max-tokens", "6"]
    asyncio.run(prepare_uncertainty.main([*flags, "--limit", "4", "--together", "3"]))
    begun = (output / "train.jsonl").read_text()
    asyncio.run(prepare_uncertainty.main([*flags, "--together", "2"]))
    rows = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    assert (output / "train.jsonl").read_text().startswith(begun)
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert all(row["messages"][-1]["role"] == "assistant" and row["target"] == "uncertain" for row in rows)
    assert [row["documents"] for row in rows] == [record["documents"] for record in records]
    assert "{'uncertain': 6}" in capsys.readouterr().out
