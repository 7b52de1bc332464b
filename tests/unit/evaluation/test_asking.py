"""What an answer is taken for: a label, a text, or nothing."""

from __future__ import annotations

import pytest

from alora_serve.errors import IntrinsicOutputError
from alora_serve.evaluation.asking import MAX_LABELS, ask_all, labels_of
from alora_serve.evaluation.items import Item
from alora_serve.training.rows import Row
from alora_serve.types import ChatMessage, IntrinsicResult, Timings, Usage

YES_OR_NO = {"": {"yes": 0.7, "no": 0.3}}


class Says:
    """Answers every row with the text that is its target's, or with none in the right form."""

    def __init__(
        self, answers: dict[str, str | None], probabilities: dict[str, dict[str, float]] | None = None
    ) -> None:
        self.answers = answers
        self.probabilities = probabilities or {}

    def ask(self, row: Row) -> IntrinsicResult:
        text = self.answers[row.target]
        if text is None:
            raise IntrinsicOutputError("cut off")
        usage, timings = Usage(12, cached_tokens=8, generated_tokens=3), Timings(total_seconds=0.25)
        return IntrinsicResult(None, text, usage, timings, self.probabilities)


def asked(answers: dict[str, str | None], probabilities: dict[str, dict[str, float]] | None = None) -> tuple[Item, ...]:
    rows = [Row((ChatMessage("user", "?"),), (), target, f"row of {target}") for target in answers]
    told: list[Item] = []
    items = ask_all(Says(answers, probabilities), rows, 2, told.append)
    assert {item.item_id for item in told} == {row.row_id for row in rows}
    return items


@pytest.mark.parametrize(
    ("raw_text", "prediction", "form"),
    [
        ('"yes"', "yes", "label"),
        ("7", "7", "label"),
        ("true", "true", "label"),
        ('{"question": "Who is it?"}', "Who is it?", "text"),
        ('{"count": 3}', "3", "text"),
        ('{"a": 1, "b": "x"}', '{"a": 1, "b": "x"}', "text"),
        ("[1, 2]", "[1, 2]", "text"),
    ],
)
def test_an_answer_is_read_by_its_form(raw_text: str, prediction: str, form: str) -> None:
    (item,) = asked({"x": raw_text})
    assert (item.prediction, item.form) == (prediction, form)
    assert (item.seconds, item.prompt_tokens, item.cached_tokens, item.generated_tokens) == (0.25, 12, 8, 3)


def test_what_was_weighed_is_a_label_wherever_it_stands() -> None:
    (item,) = asked({"yes": '{"verdict": "yes"}'}, {"/verdict": YES_OR_NO[""]})
    assert (item.prediction, item.form, item.confidence) == ("yes", "label", 0.7)


def test_few_texts_are_no_labels_and_many_labels_are_none() -> None:
    assert labels_of(asked({"yes": '"yes"', "no": '"yes"'})) == ("no", "yes")
    assert labels_of(asked({"Who is Ann?": '{"question": "Who?"}', "Why?": '{"question": "Why?"}'})) == ()
    many = {f"target {number}": '"x"' for number in range(MAX_LABELS)}
    assert labels_of(asked({**many})) == tuple(sorted(many))
    assert labels_of(asked({**many, "one more": '"x"'})) == ()


def test_an_answer_that_cannot_be_read_is_wrong_and_costs_nobody_knows_what() -> None:
    items = asked({"yes": '"yes"', "no": None}, YES_OR_NO)
    assert [item.form for item in items] == ["label", "none"]
    assert (items[1].prediction, items[1].is_right, items[1].probabilities) == ("", False, {})
    assert labels_of(items) == ("no", "yes")
    assert labels_of(asked({"Why?": '{"question": "Why?"}', "Who?": None})) == ()
