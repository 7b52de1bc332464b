"""Where lines come from: a terminal with editing, history and completion, or any other standard input.

Lines are edited by prompt_toolkit, not by the readline of the standard library: on macOS and in many builds of Python
that is libedit, which takes each line of a pasted text for a line of its own, and here a line is a turn. It is two
packages of 1.2 MB, imported only by a chat on a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from platformdirs import user_state_path

from alora_serve.cli.chat.commands import completions
from alora_serve.errors import InvalidRequestError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output


class Keyboard(Protocol):
    """Reads what the user types. Not thread-safe."""

    def read(self) -> str | None:
        """The next line, which may hold line breaks; None when there are no more.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed instead.
            InvalidRequestError: what is read is not UTF-8.
        """
        ...


class LineReader:
    """Standard input that is no terminal: a line is a turn or a command."""

    def __init__(self, lines: TextIO, *, as_json: bool = False) -> None:
        """With ``as_json``, a line that is a JSON string means that string, which may hold line breaks."""
        self._lines = lines
        self._as_json = as_json

    def read(self) -> str | None:
        """See :class:`Keyboard`."""
        try:
            line = self._lines.readline()
        except UnicodeDecodeError as error:
            raise InvalidRequestError.of("standard input", f"is not UTF-8 text: {error}") from error
        if not line:
            return None
        if self._as_json and line.startswith('"'):
            try:
                return str(json.loads(line))
            except ValueError:
                return line
        return line


class Terminal:
    """A terminal: Enter sends, Alt-Enter breaks the line, pasted line breaks stay, Tab completes, Up goes back."""

    def __init__(
        self,
        adapters: Callable[[], Sequence[str]],
        history: Path | None,
        *,
        source: Input | None = None,
        screen: Output | None = None,
    ) -> None:
        """Prepare.

        Args:
            adapters: names to complete.
            history: file that remembers lines from chat to chat; None remembers them for this one.
            source: where keys come from, unless it is the terminal.
            screen: where the line is shown, unless it is the terminal.
        """
        self._session = _session(adapters, history, source, screen)

    def read(self) -> str | None:
        """See :class:`Keyboard`. Ctrl-C with something typed drops it."""
        try:
            return self._session.prompt([("bold ansicyan", "> ")])
        except EOFError:
            return None


def history_file() -> Path:
    """Where lines are remembered from chat to chat, under the user's own state directory."""
    return user_state_path("alora-serve", appauthor=False) / "chat_history"


def _session(
    adapters: Callable[[], Sequence[str]], history: Path | None, source: Input | None, screen: Output | None
) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.shortcuts import CompleteStyle

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            word, found = completions(document.text_before_cursor, adapters())
            return (Completion(name, start_position=-len(word)) for name in found)

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    if history is not None:
        history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        history.touch(mode=0o600)
    return PromptSession(
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=Commands(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=keys,
        enable_history_search=True,
        input=source,
        output=screen,
    )
