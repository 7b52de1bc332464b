from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.cli.chat.commands import COMMANDS, Command, Misunderstood, Say, completions, parse


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("  \n", None),
        ("What is a tide?\n", Say("What is a tide?")),
        ("two\nlines", Say("two\nlines")),
        ("//etc/hosts is a file", Say("/etc/hosts is a file")),
        ("/adapter jailbreak \n", Command("adapter", "jailbreak")),
        ("/intrinsics a  b", Command("intrinsics", "a  b")),
        ("/intrinsics", Command("intrinsics")),
        ("/undo", Command("undo")),
        ("/system Be short.", Command("system", "Be short.")),
        ("/save my file.json", Command("save", "my file.json")),
        ("/system\nBe short.\nBe kind.", Command("system", "Be short.\nBe kind.")),
    ],
)
def test_a_line_is_a_turn_or_a_command(line: str, meaning: object) -> None:
    assert parse(line) == meaning


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/adaptor x", "no command /adaptor, did you mean /adapter?; /help shows them all"),
        ("/", "no command /; /help shows them all"),
        ("/undo 2", "/undo takes nothing more, not '2'"),
        ("/adapter", "/adapter NAME: asks an adapter about the conversation so far; its answer stays outside of it"),
        ("/load", "/load FILE: goes on with a conversation written as JSON"),
    ],
)
def test_a_mistyped_command_is_explained_and_never_said_to_the_model(line: str, says: str) -> None:
    assert parse(line) == Misunderstood(says)


@given(st.text())
def test_every_line_means_something(line: str) -> None:
    meaning = parse(line)
    assert (meaning is None) == (not line.strip())


def test_tab_completes_commands_and_the_names_that_some_of_them_take() -> None:
    names = ("jailbreak", "jailbreak-lora", "uncertainty")
    assert completions("/", names) == ("/", tuple(f"/{command.name}" for command in COMMANDS))
    assert completions("/un", names) == ("/un", ("/undo",))
    assert completions("/adapter ja", names) == ("ja", ("jailbreak", "jailbreak-lora"))
    assert completions("/intrinsics jailbreak un", names) == ("un", ("uncertainty",))
    assert completions("/save ja", names) == ("ja", ())
    assert completions("I say ja", names) == ("ja", ())
    assert completions("adapter ja", names) == ("ja", ())
