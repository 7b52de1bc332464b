"""The examples of granite-common, whose formatter mellea's grew from: its files, requests, answers and results."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from alora_serve.intrinsics import Answer, IntrinsicDefinition, Question, ScoredToken, ask, conclude, parse_definition
from alora_serve.types import ChatMessage, Document, Prompt

EXAMPLES = Path(__file__).parent / "granite_common"
CASES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
WEIGHED_HERE_ALONE = ("answer_relevance_classifier", "requirement_check")
"""Booleans, to which granite-common never finds an alternative (docs/intrinsics.md)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One file of theirs, as ours read it."""

    told: dict[str, Any]
    definition: IntrinsicDefinition

    @classmethod
    def of(cls, name: str) -> Example:
        told = json.loads((EXAMPLES / f"{name}.json").read_text())
        return cls(told, parse_definition((EXAMPLES / f"{told['definition']}.yaml").read_bytes()))

    def question(self) -> Question:
        given = self.told["input"]
        documents = (given.get("extra_body") or {}).get("documents") or ()
        prompt = Prompt(
            messages=tuple(ChatMessage(turn["role"], turn["content"]) for turn in given["messages"]),
            documents=tuple(Document("", each["text"], each.get("doc_id", "")) for each in documents),
        )
        return ask(self.definition, prompt, self.told["arguments"], template_takes_documents=True)

    def answers(self) -> list[Answer]:
        sentences = self.question().sentences
        return [
            Answer(choice["message"]["content"], tokens_of(choice.get("logprobs")), sentences)
            for choice in self.told["model_output"]["choices"]
        ]

    def results(self) -> list[Any]:
        return [json.loads(choice["message"]["content"]) for choice in self.told["expected_result"]["choices"]]


def tokens_of(logprobs: dict[str, Any] | None) -> tuple[ScoredToken, ...]:
    def content(token: dict[str, Any]) -> bytes:
        return token["token"].encode() if token.get("bytes") is None else bytes(token["bytes"])

    return tuple(
        ScoredToken(
            content(token),
            token["logprob"],
            tuple((content(other), other["logprob"]) for other in token["top_logprobs"]),
        )
        for token in (logprobs or {}).get("content") or ()
    )


@pytest.mark.parametrize("name", CASES)
def test_requests_are_theirs(name: str) -> None:
    example = Example.of(name)
    question, expected = example.question(), example.told["expected_request"]
    turns = [{"content": turn.content, "role": turn.role} for turn in question.prompt.messages]
    assert turns == expected["messages"]
    extra = expected.get("extra_body") or {}
    assert [(each.text, each.doc_id) for each in question.prompt.documents] == [
        (each["text"], each.get("doc_id", "")) for each in extra.get("documents") or ()
    ]
    assert json.loads(example.definition.json_schema) == (extra.get("structured_outputs") or {}).get("json")
    assert example.definition.needs_logprobs == bool(expected.get("logprobs"))
    sampling = example.definition.sampling
    if "max_completion_tokens" in expected.keys() - example.told["input"].keys():
        assert sampling.max_tokens == expected["max_completion_tokens"]
    if "temperature" in expected.keys() - example.told["input"].keys():
        assert sampling.temperature == expected["temperature"]


@pytest.mark.parametrize("name", [name for name in CASES if "model_output" in Example.of(name).told])
def test_results_are_theirs(name: str) -> None:
    example = Example.of(name)
    for answer, expected in zip(example.answers(), example.results(), strict=True):
        result = conclude(example.definition, answer).result
        if name in WEIGHED_HERE_ALONE:
            assert not same(result, expected)
            alone = replace(answer, tokens=tuple(replace(token, alternatives=()) for token in answer.tokens))
            result = conclude(example.definition, alone).result
        assert same(result, expected), (result, expected)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*_ollama.yaml")))
def test_a_file_for_ollama_means_the_same_with_documents_as_turns(name: str) -> None:
    """There, the schema is a parameter of the generation."""
    plain = parse_definition((EXAMPLES / f"{name.removesuffix('_ollama')}.yaml").read_bytes())
    ollama = parse_definition((EXAMPLES / f"{name}.yaml").read_bytes())
    assert json.loads(ollama.json_schema) == json.loads(plain.json_schema)
    assert ollama.docs_as_message == "roles"
    assert (ollama.sampling, ollama.transformations) == (plain.sampling, plain.transformations)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, float):
        return bool(ours == pytest.approx(theirs, rel=1e-6))
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)
