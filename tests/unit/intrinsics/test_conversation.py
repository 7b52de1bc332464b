"""The conversation as an adapter sees it, where mellea leaves it to its caller."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.errors import InvalidRequestError
from alora_serve.intrinsics import (
    Answer,
    IntrinsicDefinition,
    Question,
    ask,
    conclude,
    parse_definition,
    with_documents_placed,
)
from alora_serve.intrinsics.sentences import Tagger
from alora_serve.types import ChatMessage, Document, PrefixHandle, Prompt, PromptKind
from intrinsic_cases import CITATIONS

HANDLE = PrefixHandle(b"m" * 32, b"s" * 32, (1, 2), (3,), PromptKind.CONVERSATION, "user", False, 0)
TURNS = (ChatMessage("system", "Be brief."), ChatMessage("user", "Why? Tell me."))
DOCUMENTS = (Document("Title", "One. Two."), Document("", "Three.", "c"))


def definition(text: str = "") -> IntrinsicDefinition:
    return parse_definition(f"model: ~\nresponse_format: ~\ntransformations: ~\n{text}".encode())


def asked(text: str, prompt: Prompt, *, takes_documents: bool = False, **parameters: Any) -> Question:
    return ask(definition(text), prompt, parameters, template_takes_documents=takes_documents)


def test_without_a_definition_of_their_form_documents_are_left_to_a_template_that_takes_them() -> None:
    prompt = Prompt(messages=TURNS, documents=DOCUMENTS)
    assert asked("", prompt, takes_documents=True).prompt == prompt


def test_where_the_template_has_no_place_documents_become_a_turn_after_the_systems() -> None:
    question = asked("", Prompt(messages=TURNS, documents=DOCUMENTS))
    text = "You have access to the following documents:\n\n[Document 1]\nOne. Two.\n\n[Document c]\nThree."
    assert question.prompt.messages == (TURNS[0], ChatMessage("user", text), TURNS[1])
    assert question.prompt.documents == ()
    of_the_base_model = with_documents_placed(
        Prompt(messages=TURNS, documents=DOCUMENTS), template_takes_documents=False
    )
    assert question.conversation == of_the_base_model, "so they share its KV"
    alone = with_documents_placed(Prompt(messages=TURNS[:1], documents=DOCUMENTS), template_takes_documents=False)
    assert alone.messages == question.prompt.messages[:2]


def test_the_form_that_a_definition_asks_for_stands_before_everything() -> None:
    question = asked("docs_as_message: roles", Prompt(messages=TURNS, documents=DOCUMENTS), takes_documents=True)
    assert [turn.role for turn in question.prompt.messages] == ["document 1", "document c", "system", "user"]


def test_intrinsics_that_rewrite_alike_share_a_conversation() -> None:
    prompt = Prompt(messages=TURNS, documents=DOCUMENTS)
    questions = [asked(f"instruction: {word}", prompt) for word in ("Certain?", "Grounded?")]
    assert questions[0].conversation == questions[1].conversation
    assert questions[0].prompt != questions[1].prompt


def test_an_instruction_is_filled_in_with_parameters_and_the_tagged_last_message() -> None:
    text = "instruction: '{{x}} {name} {count}: {last_message}'\nsentence_boundaries: {last_message: i}"
    question = asked(text, Prompt(messages=TURNS), name="{last_message}", count=3)
    assert question.instruction == ChatMessage("user", "{x} {last_message} 3: <i0> Why? <i1> Tell me.")


@pytest.mark.parametrize(("parameters", "problem"), [({}, "is missing"), ({"name": [1]}, "neither text")])
def test_a_parameter_that_cannot_be_filled_in_is_named(parameters: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as refused:
        asked("instruction: '{name}'", Prompt(messages=TURNS), **parameters)
    assert [violation.field for violation in refused.value.violations] == ["parameters.name"]


@pytest.mark.parametrize(
    ("text", "prompt", "field"),
    [
        ("", Prompt(), "prompt.messages"),
        ("", Prompt(token_ids=(1, 2)), "prompt.token_ids"),
        ("", Prompt(text="x"), "prompt.text"),
        ("instruction: '{last_message}'", Prompt(handle=HANDLE), "prompt.handle"),
        ("sentence_boundaries: {last_message: i}", Prompt(handle=HANDLE), "prompt.handle"),
        ("sentence_boundaries: {all_but_last_message: i}", Prompt(handle=HANDLE, messages=TURNS), "prompt.handle"),
        ("sentence_boundaries: {documents: c}", Prompt(handle=HANDLE, messages=TURNS), "prompt.handle"),
        ("", Prompt(handle=HANDLE, documents=DOCUMENTS), "prompt.documents"),
    ],
)
def test_what_lies_in_a_handle_or_nowhere_cannot_be_rewritten(text: str, prompt: Prompt, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        asked(text, prompt)
    assert [violation.field for violation in refused.value.violations] == [field]


def test_an_instruction_follows_a_handle() -> None:
    question = asked("instruction: Certain?", Prompt(handle=HANDLE))
    assert question.prompt == Prompt(handle=HANDLE, messages=(ChatMessage("user", "Certain?"),))


def test_the_requests_template_arguments_win_over_the_definitions() -> None:
    text = "parameters: {extra_body: {chat_template_kwargs: {a: 1, b: 2}}}"
    question = asked(text, Prompt(messages=TURNS, template_arguments={"b": 3}))
    assert question.prompt.template_arguments == {"a": 1, "b": 3}


def test_documents_without_an_id_are_cited_by_the_position_that_the_prompt_shows() -> None:
    citing = parse_definition(CITATIONS.encode())
    documents = (Document("", "One. Two."), Document("", "Three. Four."), Document("", "Five.", "c"))
    question = ask(citing, Prompt(messages=TURNS, documents=documents), {}, template_takes_documents=False)
    shown = question.prompt.messages[1].content
    assert [f"[Document {name}]" in shown for name in ("1", "2", "c")] == [True] * 3

    def cited(*sentences: int) -> list[tuple[str, str]]:
        answer = Answer(f'[{{"r": 0, "c": {list(sentences)}}}]', (), question.sentences)
        return [(span["citation_doc_id"], span["citation_text"]) for span in conclude(citing, answer).result]

    assert cited(0, 2) == [("1", "One. "), ("2", "Three. ")], "both begin at 0"
    assert cited(0, 3) == [("1", "One. "), ("2", "Four.")], "one ends where the other begins"
    assert cited(1, 0, 2, 3, 4) == [("1", "One. Two."), ("2", "Three. Four."), ("c", "Five.")]


@given(st.lists(st.text(alphabet="ab .?!\n<c0>", max_size=40), max_size=4), st.integers(0, 3))
def test_tags_number_all_sentences_and_lose_nothing_but_white_space(texts: list[str], first: int) -> None:
    tagger = Tagger({}, first)
    for text in texts:
        before = tagger.next_number
        tagged = tagger.tag(text, "t")
        found = [tagger.found[number] for number in range(before, tagger.next_number)]
        plain = "".join(sentence.text for sentence in found)
        assert "".join(plain.split()) == "".join(text.split())
        assert all(plain[sentence.begin : sentence.end] == sentence.text for sentence in found)
        assert tagged == "".join(f"<t{before + index}> {sentence.text}" for index, sentence in enumerate(found))
    assert list(tagger.found) == list(range(first, tagger.next_number))


def test_nothing_given_is_changed() -> None:
    prompt = Prompt(messages=TURNS, documents=DOCUMENTS)
    before = replace(prompt)
    asked("sentence_boundaries: {last_message: i, documents: c, all_but_last_message: c}", prompt)
    assert prompt == before
