"""Calls are told from text, however an answer is cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_front.tool_calls import Call, ForcedCallReader, ToolCallReader

ROME = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
CALL = Call("weather", '{"place": "Rome"}')
CLOCK = Call("clock", "{}")

ANSWERS = {
    "text alone": ("It is sunny.", "It is sunny.", []),
    "a call alone": (ROME, "", [CALL]),
    "text, a call, text": (f"Let me see. {ROME} Done.", "Let me see. Done.", [CALL]),
    "two calls": (f'{ROME}<tool_call>{{"name": "clock"}}</tool_call>', "", [CALL, CLOCK]),
    "white space around calls": (f"\n{ROME}\n{ROME}\n\n", "", [CALL, CALL]),
    "white space around text": (f"{ROME}\n\nSunny.\n", "Sunny.\n", [CALL]),
    "a list of calls": (
        '<tool_call>[{"name": "weather", "arguments": {"place": "Rome"}}, {"name": "clock"}]</tool_call>',
        "",
        [CALL, CLOCK],
    ),
    "the other name for arguments": (ROME.replace("arguments", "parameters"), "", [CALL]),
    "an end mark left out": (ROME.removesuffix("</tool_call>"), "", [CALL]),
    "a tool that is not there": (ROME.replace("weather", "nuke"), ROME.replace("weather", "nuke"), []),
    "a name that is no text": (ROME.replace('"weather"', "[]"), ROME.replace('"weather"', "[]"), []),
    "no JSON": ("<tool_call>weather(Rome)</tool_call>!", "<tool_call>weather(Rome)</tool_call>!", []),
    "cut in the middle": (ROME[:30], ROME[:30], []),
    "the beginning of a mark": ("a < b <tool", "a < b <tool", []),
}


def read(reader: ToolCallReader | ForcedCallReader, pieces: list[str]) -> tuple[str, list[Call]]:
    parts = [*(reader.push(piece) for piece in pieces), reader.finish()]
    return "".join(text for text, _ in parts), [call for _, calls in parts for call in calls]


@pytest.mark.parametrize("answer", ANSWERS)
@given(data=st.data())
def test_the_pieces_do_not_matter(answer: str, data: st.DataObject) -> None:
    text, plain, calls = ANSWERS[answer]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(ToolCallReader({"weather", "clock"}), pieces) == (plain, calls)


@given(st.text())
def test_text_without_marks_is_never_lost(text: str) -> None:
    assert read(ToolCallReader({"weather"}), list(text)) == (text, [])


def test_what_is_no_part_of_a_mark_is_not_held_back() -> None:
    reader = ToolCallReader({"weather"})
    assert reader.push("It is <b>sunny</b> <to") == ("It is <b>sunny</b>", [])
    assert reader.push("day>") == (" <today>", [])


def test_of_several_calls_the_first_alone_is_told_where_one_is_wanted() -> None:
    listed = f"<tool_call>{json.dumps([{'name': 'clock'}, {'name': 'weather'}])}</tool_call>"
    for answer in (f"{listed}\n{ROME}", f"{listed}{ROME.removesuffix('</tool_call>')}"):
        assert read(ToolCallReader({"weather", "clock"}, only_first=True), [answer]) == ("", [CLOCK])


def test_a_forced_call_is_the_whole_answer_or_text_when_it_was_cut() -> None:
    assert read(ForcedCallReader("weather"), ['{"place":', ' "Rome"}']) == ("", [CALL])
    either = json.dumps({"name": "clock", "arguments": {}})
    assert read(ForcedCallReader(None), [either]) == ("", [CLOCK])
    assert read(ForcedCallReader(None), [either[:-3]]) == (either[:-3], [])
    deep = '{"a":' + "[" * 5000
    assert read(ForcedCallReader("weather"), [deep]) == (deep, [])
