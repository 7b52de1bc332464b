from __future__ import annotations

import argparse
import json
from pathlib import Path

import harness
import pytest
import torch
from correctness import Question, Verdict, computed_together, key_of, summary, verdict, with_verdicts
from harness import Correct, Row, Sample, rounds_after
from systems.base import Answer, in_turn
from systems.engine import shared_step_seconds


def row(system: str, *total_seconds: float, what: str = "") -> Row:
    return Row(system, 2048, tuple(Sample(total / 4, total) for total in total_seconds), what=what)


def test_a_row_says_median_and_spread() -> None:
    measured = row("ours", 3.0, 1.0, 2.0)

    assert measured.median("total_seconds") == 2.0
    assert measured.spread("total_seconds") == (1.0, 3.0)
    assert measured.median("first_token_seconds") == 0.5


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 5), (19.9, 5), (20.0, 3), (59.0, 3), (60.0, 0), (900.0, 0)])
def test_the_very_slow_are_asked_less_often(seconds: float, rounds: int) -> None:
    assert rounds_after(seconds, 5) == rounds


def test_no_system_is_asked_more_often_than_wanted() -> None:
    assert rounds_after(30.0, 1) == 1


def test_a_row_goes_to_the_file_with_every_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "OUTPUT", tmp_path / "bench")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "12345")

    path = harness.write("rows", [row("ours", 1.0, 3.0)], {"dtype": "bfloat16"})

    written = json.loads(path.read_text())
    assert written["dtype"] == "bfloat16"
    assert written["machine"]["cores"] >= 1
    assert {"processor", "gpus", "versions", "commit", "settings"} <= written["machine"].keys()
    settings = written["machine"]["settings"]
    assert settings["environment"]["MALLOC_TRIM_THRESHOLD_"] == "12345"
    assert "HOME" not in settings["environment"]
    assert settings["services"]["OMP_WAIT_POLICY"] == "passive"
    assert settings["torch_threads"] == torch.get_num_threads()
    assert {"torch", "lmdb", "redis"} <= written["machine"]["versions"].keys()
    [first] = written["rows"]
    assert [sample["total_seconds"] for sample in first["samples"]] == [1.0, 3.0]
    assert first["total_seconds_median"] == 2.0
    assert first["total_seconds_spread"] == [1.0, 3.0]


def test_a_verdict_counts_equal_answers_and_keeps_the_worst_gap() -> None:
    verdicts = [Verdict(True, 0.1), Verdict(False, 2.0), Verdict(True, 0.0)]

    assert summary(verdicts, "bfloat16") == Correct(equal=2, of=3, dtype="bfloat16", largest_gap=2.0)
    assert summary([Verdict(True, None)], "float32").largest_gap is None


def test_in_float32_pefts_answer_is_computed_once_a_prompt_and_in_bfloat16_each_answer_is_run() -> None:
    same, other, elsewhere = Question("a", (1, 2), (3, 4)), Question("a", (1, 2), (3, 5)), Question("a", (9,), (3, 4))

    assert computed_together([same, other, elsewhere], "float32") == [[same, other], [elsewhere]]
    assert computed_together([same, other, elsewhere], "bfloat16") == [[same], [other], [elsewhere]]


def test_an_answer_is_equal_if_it_has_pefts_tokens_or_in_bfloat16_if_the_rule_says_so() -> None:
    question = Question(None, (1, 2), (3, 4))

    assert verdict(question, {"peft_tokens": [3, 4]}) == Verdict(True, None)
    assert verdict(question, {"peft_tokens": [3, 5]}) == Verdict(False, None)
    assert verdict(question, {"equal": True, "largest_gap": 0.1}) == Verdict(True, 0.1)


def test_verdicts_go_to_the_row_they_were_kept_for() -> None:
    first, other = row("ours", 1.0, what="1 adapter"), row("ours", 1.0, what="5 adapters")
    correct = Correct(5, 5, "float32")

    judged = with_verdicts([first, other], {key_of(other): correct})

    assert [judged_row.correct for judged_row in judged] == [None, correct]


def test_a_step_is_timed_only_while_all_streams_run() -> None:
    # The second stream joins at 5 and the first leaves at 8: of the first, only the steps from 5 to 8 are shared.
    first = [0.0, 0.1, 0.2, 5.0, 6.0, 8.0]
    second = [5.0, 6.0, 8.0, 8.1, 8.2]

    assert shared_step_seconds([first, second]) == 1.5
    assert shared_step_seconds([[0.0, 2.0, 4.0]]) == 2.0


def test_streams_that_never_ran_together_have_no_step() -> None:
    with pytest.raises(ValueError, match="ask for more tokens"):
        shared_step_seconds([[0.0, 1.0], [2.0, 3.0]])


def test_answers_to_questions_in_turn_are_timed_from_the_first_question() -> None:
    asked = in_turn([Answer((1, 2), 0.25, 1.0), Answer((3, 4), 0.5, 2.0), Answer((5, 6), 0.25, 1.5)])

    assert [(answer.first_token_seconds, answer.total_seconds) for answer in asked.answers] == [
        (0.25, 1.0),
        (1.5, 3.0),
        (3.25, 4.5),
    ]
    assert asked.total_seconds == 4.5
    assert [answer.token_seconds for answer in asked.answers] == [0.75, 1.5, 1.25]


@pytest.mark.parametrize(
    ("given", "suffix"),
    [
        ({}, ""),
        ({"quick": True}, "-quick"),
        ({"kind": "all-linear", "device": "cuda:1", "quick": True}, "-all-linear-cuda1-quick"),
    ],
)
def test_only_the_figures_that_people_quote_have_a_plain_name(given: dict[str, object], suffix: str) -> None:
    arguments = {"kind": "qkv", "device": "cpu", "quick": False} | given

    assert harness.file_suffix(argparse.Namespace(**arguments)) == suffix
