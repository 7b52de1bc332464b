from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from alora_serve.cli.chat.keyboard import LineReader, Terminal, history_file
from alora_serve.errors import InvalidRequestError

ENTER, TAB, UP, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\t", "\x1b[A", "\x1b\r", "\x03", "\x04"


@pytest.fixture
def keys() -> Iterator[Any]:
    with create_pipe_input() as pipe:
        yield pipe


@pytest.fixture
def terminal(keys: Any) -> Terminal:
    return Terminal(lambda: ["jailbreak", "uncertainty"], None, source=keys, screen=DummyOutput())


def test_a_pipe_gives_its_lines_and_ends() -> None:
    reader = LineReader(io.StringIO('one\n"two"\n'))
    assert [reader.read() for _ in range(3)] == ["one\n", '"two"\n', None]


def test_a_pipe_of_something_else_than_utf8_is_refused_by_name() -> None:
    reader = LineReader(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(InvalidRequestError, match="standard input: is not UTF-8 text"):
        reader.read()


def test_a_machine_may_send_a_turn_with_line_breaks_as_a_json_string() -> None:
    reader = LineReader(io.StringIO(json.dumps("one\ntwo") + '\nthree\n"four\n'), as_json=True)
    assert [reader.read() for _ in range(4)] == ["one\ntwo", "three\n", '"four\n', None]


def test_a_terminal_edits_breaks_lines_and_keeps_those_of_a_pasted_text(terminal: Terminal, keys: Any) -> None:
    keys.send_text(f"What is a tidy\x7fe?{ENTER}")
    assert terminal.read() == "What is a tide?"
    keys.send_text(f"{UP}{ENTER}")
    assert terminal.read() == "What is a tide?"
    keys.send_text(f"one{ALT_ENTER}two{ENTER}")
    assert terminal.read() == "one\ntwo"
    keys.send_text(f"\x1b[200~three\nfour\x1b[201~{ENTER}")
    assert terminal.read() == "three\nfour"


def test_tab_completes_a_command_and_an_adapter(terminal: Terminal, keys: Any) -> None:
    keys.send_text(f"/adap{TAB} jail{TAB}{ENTER}")
    assert terminal.read() == "/adapter jailbreak"


def test_ctrl_c_drops_what_is_typed_and_then_interrupts(terminal: Terminal, keys: Any) -> None:
    keys.send_text(f"nonsense{CTRL_C}sense{ENTER}")
    assert terminal.read() == "sense"
    keys.send_text(CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        terminal.read()
    keys.send_text(CTRL_D)
    assert terminal.read() is None


def test_lines_are_remembered_for_the_next_chat_where_only_their_user_can_read_them(keys: Any, tmp_path: Path) -> None:
    file = tmp_path / "state" / "chat_history"
    for typed, read in ((f"one{ENTER}", "one"), (f"{UP}{ENTER}", "one")):
        terminal = Terminal(list, file, source=keys, screen=DummyOutput())
        keys.send_text(typed)
        assert terminal.read() == read
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert history_file().name == "chat_history"


def test_a_chat_in_a_pipe_imports_no_line_editor() -> None:
    code = (
        "import sys; import alora_serve.cli.chat.start; print('prompt_toolkit' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
