"""What a typed line means: something to say, or a command. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

SIGN: Final = "/"
OFF: Final = "off"
_WORD: Final = re.compile(r"\S*")


@dataclass(frozen=True, slots=True)
class CommandHelp:
    """One command as people learn it.

    Attributes:
        name: without the sign.
        arguments: as written in the help; required ones stand without brackets.
        meaning: what it does, in a sentence.
    """

    name: str
    arguments: str
    meaning: str

    @property
    def usage(self) -> str:
        """How it is typed."""
        return f"{SIGN}{self.name} {self.arguments}".rstrip()


COMMANDS: Final = (
    CommandHelp("adapter", "NAME", "asks an adapter about the conversation so far; its answer stays outside of it"),
    CommandHelp("keep", "", "makes the answer of the adapter asked last the assistant's next turn"),
    CommandHelp("intrinsics", "[NAME ...]", f"adapters to ask after every turn; alone shows them, '{OFF}' asks none"),
    CommandHelp("adapters", "", "lists the adapters"),
    CommandHelp("system", "[TEXT]", f"what the system says first; alone shows it, '{OFF}' removes it"),
    CommandHelp("undo", "", "takes back your last turn and all that followed"),
    CommandHelp("retry", "", "has your last turn answered again, or at all if it was not"),
    CommandHelp("usage", "", "where the tokens of the last turn came from, and where its time went"),
    CommandHelp("save", "FILE", "writes the conversation as JSON"),
    CommandHelp("load", "FILE", "goes on with a conversation written as JSON"),
    CommandHelp("help", "", "shows this"),
    CommandHelp("quit", "", "leaves, as the end of input does"),
)
_BY_NAME: Final = {command.name: command for command in COMMANDS}


@dataclass(frozen=True, slots=True)
class Say:
    """The user's turn."""

    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command that exists, with what it needs.

    Attributes:
        name: of :data:`COMMANDS`.
        argument: the rest of the line, without outer white space; may be empty only where the command allows it.
    """

    name: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Misunderstood:
    """A line that is no command though it begins as one. ``problem`` says why and what to type."""

    problem: str


def parse(line: str) -> Say | Command | Misunderstood | None:
    """What a line means; None for an empty one. ``//`` at its beginning says a turn that begins with ``/``."""
    text = line.strip()
    if not text:
        return None
    if text.startswith(SIGN * 2):
        return Say(text.removeprefix(SIGN))
    if not text.startswith(SIGN):
        return Say(text)
    name = _WORD.match(text, len(SIGN))[0]  # type: ignore[index]  # it may be empty, and so always matches
    command, argument = _BY_NAME.get(name), text[len(SIGN) + len(name) :].strip()
    if command is None:
        return Misunderstood(f"no command {SIGN}{name}{nearest(name, _BY_NAME, SIGN)}; {SIGN}help shows them all")
    if argument and not command.arguments:
        return Misunderstood(f"{command.usage} takes nothing more, not {argument!r}")
    if not argument and command.arguments and not command.arguments.startswith("["):
        return Misunderstood(f"{command.usage}: {command.meaning}")
    return Command(name, argument)


def nearest(name: str, names: Iterable[str], sign: str = "") -> str:
    """A question after the likeliest of ``names``, to put behind a message; empty if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {sign}{close[0]}?" if close else ""


def completions(typed: str, adapters: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The word that is being typed, and what it may become: a command, or an adapter's name where one is taken."""
    head, space, word = typed.rpartition(" ")
    if not space:
        return word, tuple(name for name in (f"{SIGN}{command.name}" for command in COMMANDS) if name.startswith(word))
    name = head.strip().partition(" ")[0].removeprefix(SIGN)
    if not head.startswith(SIGN) or name not in _BY_NAME or "NAME" not in _BY_NAME[name].arguments:
        return word, ()
    return word, tuple(adapter for adapter in adapters if adapter.startswith(word))
