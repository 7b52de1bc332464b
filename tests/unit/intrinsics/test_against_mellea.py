"""The published format means here what it means to mellea, whose formatter the published adapters were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alora_serve.intrinsics import Answer, ScoredToken, ask, conclude, parse_definition
from alora_serve.types import ChatMessage, Document, Prompt
from intrinsic_cases import DEFINITIONS, Case, cases
from mellea_programs import mellea_lines

_LINES = [json.loads(line) for line in (Path(__file__).parent / "mellea_recording.jsonl").read_text().splitlines()]
MELLEA_VERSION = _LINES[0]["mellea"]
RECORDED = {line.pop("case"): line for line in _LINES[1:]}


def by_us(case: Case) -> dict[str, Any]:
    definition = parse_definition(DEFINITIONS[case.definition].encode())
    prompt = Prompt(
        messages=tuple(ChatMessage(**message) for message in case.messages),
        documents=tuple(Document(title="", **document) for document in case.documents),
    )
    question = ask(definition, prompt, case.parameters, template_takes_documents=True)
    tokens = tuple(
        ScoredToken(text.encode(), logprob, tuple((other.encode(), value) for other, value in alternatives.items()))
        for text, logprob, alternatives in case.tokens
    )
    return {
        "messages": [{"role": turn.role, "content": turn.content} for turn in question.prompt.messages],
        "documents": [{"text": d.text, "doc_id": d.doc_id} for d in question.prompt.documents],
        "result": conclude(definition, Answer(case.answer, tokens, question.sentences)).result,
    }


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, float):
        return bool(ours == pytest.approx(theirs, rel=1e-9))
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_requests_and_results_are_those_that_mellea_was_recorded_with(case: Case) -> None:
    ours, recorded = by_us(case), RECORDED[case.name]
    assert ours["messages"] == recorded["messages"]
    assert same(ours["documents"], recorded["documents"])
    assert same(ours["result"], recorded["result"]), (ours["result"], recorded["result"])


def test_the_recording_uses_every_transformation() -> None:
    used = {step.yaml_name for text in DEFINITIONS.values() for step in parse_definition(text.encode()).transformations}
    assert used == {
        "decode_sentences",
        "drop_duplicates",
        "explode",
        "likelihood",
        "merge_spans",
        "nest",
        "project",
    }
    assert set(RECORDED) == {case.name for case in cases()}


@pytest.mark.timeout(900)  # mellea is installed the first time
def test_mellea_still_does_what_was_recorded() -> None:
    """Fails where another version of mellea makes something else of a file; then record it anew."""
    told, *lines = (json.loads(line) for line in mellea_lines("../../plugins/mellea_formatter.py"))
    made = {line.pop("case"): line for line in lines}
    assert made.keys() == RECORDED.keys()
    changed = [name for name, line in made.items() if not same(line, RECORDED[name])]
    assert not changed, f"mellea {told['mellea']} differs from {MELLEA_VERSION} in {changed}"
