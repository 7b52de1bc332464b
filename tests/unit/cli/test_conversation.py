from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from alora_serve.cli.conversation import load_handle, read_prompt, save_handle
from alora_serve.errors import InvalidRequestError
from alora_serve.types import ChatMessage, Document, PrefixHandle, PromptKind, ToolCall

HANDLE = PrefixHandle(bytes(32), bytes(32), (1, 2, 3), (4,), PromptKind.CONVERSATION, "user", False, 9, bytes(32))
USER = {"role": "user", "content": "hi"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def conversation(tmp_path: Path):
    def write(value: object) -> Path:
        file = tmp_path / "conversation.json"
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        return file

    return write


def test_typed_messages_alternate_between_user_and_assistant() -> None:
    prompt = read_prompt(messages=["question", "answer", "again"], system="be brief")
    assert prompt.messages == (
        ChatMessage("system", "be brief"),
        ChatMessage("user", "question"),
        ChatMessage("assistant", "answer"),
        ChatMessage("user", "again"),
    )


def test_a_file_holds_messages_and_what_else_a_prompt_has(conversation) -> None:
    call = {"id": "1", "name": "look", "arguments_json": "{}"}
    file = conversation(
        {
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "documents": [{"title": "t", "text": "body"}, {"text": "untitled", "doc_id": "7"}],
            "tools": [{"type": "function"}],
            "template_arguments": {"date_string": "today"},
        }
    )
    prompt = read_prompt(file=file)
    assert prompt.messages[1] == ChatMessage("assistant", "", (ToolCall("1", "look", "{}"),))
    assert prompt.documents == (Document("t", "body"), Document("", "untitled", "7"))
    assert prompt.tools == ({"type": "function"},)
    assert prompt.template_arguments == {"date_string": "today"}


def test_a_file_may_be_just_the_list_of_messages_and_typed_ones_follow_it(conversation) -> None:
    prompt = read_prompt(file=conversation([USER]), messages=["fine", "good"])
    assert [message.role for message in prompt.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize("text", [json.dumps([USER]), "hi\n"])
def test_standard_input_holds_a_conversation_or_one_turn_of_the_user(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert read_prompt().messages == (ChatMessage("user", "hi"),)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert read_prompt(file=Path("-")).messages == (ChatMessage("user", "hi"),)


@pytest.mark.parametrize("text", ["42", "true", "null", '"why?"', '{"turns": []}'])
def test_plain_text_on_standard_input_may_happen_to_be_json(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n"))
    assert read_prompt().messages == (ChatMessage("user", text),)


def test_standard_input_is_left_alone_when_there_is_something_else(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("do not read me"))
    assert read_prompt(messages=["hi"]).messages == (ChatMessage("user", "hi"),)


@pytest.mark.parametrize("stdin", [Terminal("typed later"), io.StringIO("")])
def test_nothing_to_continue_is_refused(monkeypatch, stdin: io.StringIO) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(InvalidRequestError, match="nothing to continue: give --message"):
        read_prompt()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("not json", "is not JSON .* it must hold a list of"),
        ('"text"', "must hold a list of"),
        ({"turns": []}, "must hold a list of"),
        ({"messages": "hi"}, "messages: is not a list but 'hi'"),
        ([{"role": "user"}], r"messages\[0\]: is not {role, content}: .*KeyError 'content'"),
        ([USER, "hi"], r"messages\[1\]: is not {role, content}: 'hi'"),
        ([{**USER, "tool_calls": [{"id": "1"}]}], r"messages\[0\]: .*KeyError 'name'"),
        ({"messages": [USER], "documents": [{}]}, r"documents\[0\]: is not {title, text}"),
        ({"messages": [USER], "documents": ["x"]}, r"documents\[0\]: is not {title, text}"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_by_what_is_wrong(
    conversation, content: object, problem: str
) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        read_prompt(file=conversation(content))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot read .*absent: No such file"):
        read_prompt(file=tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match="latin is not UTF-8 text"):
        read_prompt(file=tmp_path / "latin")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(InvalidRequestError, match=r"deep is not JSON \(maximum recursion depth"):
        read_prompt(file=tmp_path / "deep")


def test_a_handle_comes_back_from_its_file_and_new_turns_follow_it(tmp_path: Path) -> None:
    save_handle(HANDLE, tmp_path / "handle")
    prompt = read_prompt(handle_file=tmp_path / "handle", messages=["more"])
    assert prompt.handle == HANDLE
    assert prompt.messages == (ChatMessage("user", "more"),)


def test_handle_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot write"):
        save_handle(HANDLE, tmp_path / "no" / "folder")
    with pytest.raises(InvalidRequestError, match=r"cannot read .*absent"):
        load_handle(tmp_path / "absent")
    (tmp_path / "other").write_bytes(b"\xff\xff\xff")
    with pytest.raises(InvalidRequestError, match="other holds no handle"):
        load_handle(tmp_path / "other")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InvalidRequestError, match="empty holds no handle"):
        load_handle(tmp_path / "empty")
