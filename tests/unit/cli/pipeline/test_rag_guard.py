"""The guarded question's decisions, without a server; the whole of it is in tests/integration/test_rag_guard.py."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alora_serve.cli.conversation import read_prompt
from alora_serve.cli.pipeline.example import load_rag_guard
from alora_serve.cli.pipeline.meter import Answer
from alora_serve.cli.pipeline.result import Report, Spent, Step
from alora_serve.cli.pipeline.view import show_missing, show_reply, show_report, show_step
from alora_serve.cli.verdicts import Verdict
from alora_serve.errors import ConfigError
from alora_serve.types import PrefixHandle, PromptKind, Usage

HANDLES = [PrefixHandle(b"", b"", (n,), (), PromptKind.CONVERSATION, "user", False, 0) for n in range(2)]
QUESTION = "When was Harvard University formed?"
GOOD = {"jailbreak": 0.1, "answerability": 0.9, "hallucination": 0.1, "uncertainty": 0.9}


class Scripted:
    """A meter whose checks find what they are told to."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.asked: list[tuple[PrefixHandle, tuple[str, ...]]] = []

    def read(self, what: str, messages: object) -> PrefixHandle:
        return HANDLES[0]

    def ask(self, what: str, handle: PrefixHandle, *names: str) -> Mapping[str, Verdict]:
        self.asked.append((handle, names))
        return {name: Verdict(name, self._value(self.found[name])) for name in names if name in self.found}

    def _value(self, found: Any) -> Any:
        return {"likelihood": found} if isinstance(found, float) else found

    def answer(self, what: str, handle: PrefixHandle, *, max_tokens: int) -> Answer:
        return Answer("In 1636.", HANDLES[1])


@pytest.mark.parametrize(
    ("changed", "text", "warnings", "asked"),
    [
        ({}, "In 1636.", (), 4),
        ({"jailbreak": 0.9}, "I can't help with that.", (), 1),
        ({"answerability": 0.1}, "The document does not say.", (), 3),
        ({"hallucination": 0.9}, "In 1636.", ("the document does not support this",), 4),
        ({"uncertainty": 0.1}, "In 1636.", ("the model is not certain of this",), 4),
    ],
)
def test_each_check_decides_what_it_is_there_for(
    changed: Mapping[str, float], text: str, warnings: tuple[str, ...], asked: int
) -> None:
    meter = Scripted({**GOOD, **changed})
    reply = load_rag_guard().rag_guard(meter, ())
    assert (reply.text, reply.warnings, len(meter.asked)) == (text, warnings, asked)


@pytest.mark.parametrize("said", [{"rewritten_question": QUESTION}, QUESTION], ids=["typed", "plain"])
def test_the_reply_tells_the_question_in_full_unless_it_is_refused(said: Any) -> None:
    guard = load_rag_guard().rag_guard
    assert guard(Scripted({**GOOD, "query_rewrite": said}), ()).question == QUESTION
    assert guard(Scripted({**GOOD, "query_rewrite": said, "answerability": 0.1}), ()).question == QUESTION
    assert guard(Scripted({**GOOD, "query_rewrite": said, "jailbreak": 0.9}), ()).question == ""
    assert guard(Scripted(GOOD), ()).question == ""


def test_a_check_that_is_not_served_lets_pass_and_the_last_ones_judge_the_answer() -> None:
    meter = Scripted({})
    reply = load_rag_guard().rag_guard(meter, ())
    assert (reply.text, reply.warnings) == ("In 1636.", ())
    assert [handle for handle, _ in meter.asked] == [HANDLES[0]] * 3 + [HANDLES[1]]


def test_the_case_is_a_conversation_about_documents_whose_licence_is_named(pytestconfig: pytest.Config) -> None:
    example = load_rag_guard()
    messages = read_prompt(file=example.CASE).messages
    assert messages[0].content.startswith("You have access to the following documents:\n\n[Document 1]\n")
    assert messages[-1].role == "user"
    assert '"licence": "CC BY-SA 4.0"' in example.CASE.read_text()
    for page in ("NOTICE", "examples/data/README.md"):
        assert example.CASE.name in (pytestconfig.rootpath / page).read_text()


def test_outside_a_checkout_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("alora_serve.__file__", str(tmp_path / "shared" / "alora_serve" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"the pipeline needs .*rag_guard.py: run it in a checkout"):
        load_rag_guard()


def test_people_see_each_step_and_what_plain_loras_would_have_cost() -> None:
    cheap = Spent.of(0.25, [Usage(prompt_tokens=700, cached_tokens=695, fetched_tokens=33, computed_tokens=5)] * 2)
    dear = Spent.of(2.0, [Usage(prompt_tokens=700, computed_tokens=700)] * 2)
    steps = (
        Step("document, turns", (), "", Spent.of(1.5, [Usage(prompt_tokens=700, computed_tokens=700)])),
        Step("jailbreak?", ("jailbreak",), "no\n", cheap, dear),
        Step("answerable?", ("answerability",), "0.9", cheap),
    )
    out = io.StringIO()
    console = Console(file=out, width=100)
    show_missing(console, ())
    show_missing(console, ("hallucination",))
    for step in steps:
        show_step(console, step)
    show_reply(console, "In 1636.", ("the model is not certain of this",))
    show_report(console, Report(steps))
    told = re.sub(r" +", " ", out.getvalue())
    for part in (
        "not served here, so not asked: hallucination",
        "document, turns 1.50 s, 700 of 700 tokens computed",
        "jailbreak? no 0.25 s, 10 of 1,400 tokens computed",
        "reply: In 1636.",
        "beware: the model is not certain of this",
        "document, turns 1.500 0 0 700 — —",
        "jailbreak? 0.250 1,390 66 10 2.000 1,400",
        "answerable? 0.250 1,390 66 10 — —",
        "Asked of plain LoRAs, that question took 2.00 s and computed 1,400 tokens; from the conversation's KV, 0.25 s",
        "8.0 times sooner.",
    ):
        assert part in told, part
    show_report(console, Report(steps[:1]))
    assert out.getvalue().count("times sooner") == 1
