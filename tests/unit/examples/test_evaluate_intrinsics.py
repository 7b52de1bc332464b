"""The script that judges the intrinsics: what its table and its picture make of evaluations that are known."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from matplotlib.axes import Axes

from alora_serve.evaluation.items import Item
from alora_serve.evaluation.report import Evaluation, summed_up, to_json
from alora_serve.types import AdapterDigest, AdapterInfo

LABELS = ("certain", "uncertain")


@pytest.fixture
def script(examples_directory: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(examples_directory))
    return importlib.import_module("evaluate_intrinsics")


def keep(directory: Path, name: str, right: int, of: int = 20) -> None:
    """An evaluation with so many right answers."""
    items = tuple(
        Item(f"r{i}", "made", "certain", label, probabilities={label: 0.9})
        for i, label in enumerate(["certain"] * right + ["uncertain"] * (of - right))
    )
    evaluation = Evaluation(name, LABELS, items)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(to_json(evaluation, summed_up(evaluation, resamples=2))))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    test = tmp_path / "test"
    keep(test, "jailbreak, in conversations-base", 12)
    keep(test, "jailbreak, in conversations-alora-0", 18)
    keep(test, "uncertainty-base", 10)
    for seed, right in enumerate((15, 16, 17)):
        keep(test, f"uncertainty-alora-{seed}", right)
        keep(test, f"uncertainty-lora-{seed}", right - 1)
    (test / "uncertainty-times.json").write_text(json.dumps({"alora": [0.1, 0.2, 0.3], "lora": [1.0, 2.0, 3.0]}))
    return tmp_path


def test_asked_are_the_base_model_in_words_and_every_adapter_that_is_trained(
    script: ModuleType, tmp_path: Path
) -> None:
    for name in ("jailbreak-alora-0", "jailbreak-lora-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / script.DONE).touch()
    (tmp_path / "jailbreak-alora-1").mkdir()  # not trained to its end
    asked = dict(script.subjects("jailbreak", script.parse_arguments(["--state", str(tmp_path)])))
    assert list(asked) == ["jailbreak-base", "jailbreak-alora-0", "jailbreak-lora-2"]
    assert asked["jailbreak-base"].recipe.instruction == script.IN_WORDS["jailbreak"]
    assert [subject.adapter for subject in asked.values()] == ["", "jailbreak-alora-0", "jailbreak-lora-2"]


def test_an_adapter_that_was_trained_anew_is_asked_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("answerability-alora-0", "test", "data/answerability"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "answerability-alora-0" / script.DONE).touch()
    row = {"messages": [{"role": "user", "content": "Why?"}], "target": "certain"}
    (tmp_path / "data" / "answerability" / "test.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def evaluate(client: object, subject: Any, *_: object) -> Evaluation:
        asked.append(subject.adapter)
        return Evaluation(subject.adapter, LABELS, (Item("r", "made", "certain", "certain"),))

    def judge(digest: str, definition: str) -> list[str]:
        asked.clear()
        info = AdapterInfo("answerability-alora-0", AdapterDigest(digest), "alora", 8, (), (1,), "", 64, True)
        client = SimpleNamespace(list_adapters=lambda: (replace(info, intrinsic_digest=definition),))
        arguments = script.parse_arguments(["--state", ".", "--data", "data", "--only", "answerability"])
        script.judge(client, arguments, script.Results(tmp_path / "test", [0]))
        return list(asked)

    monkeypatch.setattr(script, "evaluate", evaluate)
    assert judge("aa", "11") == ["", "answerability-alora-0"]
    assert judge("aa", "11") == []
    assert judge("bb", "11") == ["answerability-alora-0"]
    assert judge("bb", "22") == ["answerability-alora-0"]
    assert judge("bb", "22") == []


def test_the_table_has_means_over_seeds_differences_and_times(
    script: ModuleType, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--show", "--markdown", "--state", str(state)])
    head, rule, *inside, accuracy, macro_f1, ece = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == accuracy.count("|") == len(script.HEADS) + 1
    cells = [cell.strip() for cell in accuracy.strip("|").split("|")]
    assert cells[:3] == ["uncertainty", "accuracy", "1.000"]
    assert [cell.split()[0] for cell in cells[3:7]] == ["0.500", "0.750", "0.800", "+0.050"]
    assert cells[7:] == ["200 ms", "2000 ms", "10.0x"]
    low, high = (float(bound) for bound in re.findall(r"0\.\d+", cells[5])[1:])
    assert 0.6 < low < 0.8 < high < 1.0
    assert "macro_f1" in macro_f1
    assert "ece" in ece
    assert inside[0].startswith("| jailbreak, in conversations | accuracy | 1.000 | 0.600 ")


def test_what_is_not_known_yet_is_left_empty(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path / "test", "uncertainty-alora-0", 15)
    script.main(["--show", "--markdown", "--state", str(tmp_path)])
    accuracy: Any = capsys.readouterr().out.splitlines()[2].strip("|").split("|")
    assert [bool(cell.strip()) for cell in accuracy] == [True, True, True, False, False, True, *[False] * 4]


def test_the_picture_sets_what_came_true_against_what_was_said(
    script: ModuleType, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers were right; of seed 0, 15 were said to be with 0.9, and 5 were said not to be."""
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda _, *given, **named: drawn.append((*given, named.get("label"))))
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    script.main(["--show", "--only", "uncertainty", "--state", str(state), "--picture", str(state / "points.svg")])
    assert ([0.0, pytest.approx(0.9)], [1.0, 1.0], "seed 0: ECE 0.325") in drawn
    assert ([0.0, pytest.approx(0.9)], [5, 15], None) in drawn


def test_the_same_answers_draw_the_same_picture(script: ModuleType, state: Path) -> None:
    for name in ("one.svg", "two.svg"):
        script.main(["--show", "--only", "uncertainty", "--state", str(state), "--picture", str(state / name)])
    assert (state / "one.svg").read_bytes() == (state / "two.svg").read_bytes()
    assert b"<svg" in (state / "one.svg").read_bytes()


def test_missing_rows_are_an_error(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no test rows of uncertainty"):
        script.test_rows(script.TestSet("uncertainty"), script.parse_arguments(["--data", str(tmp_path)]))
