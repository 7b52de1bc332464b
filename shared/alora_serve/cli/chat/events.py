"""What the core asks of the shell, and what it is told. Pure.

Each :data:`Task` that the shell carries out ends in one :data:`Event`; other actions only show something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alora_serve.cli.chat.conversation import Conversation
from alora_serve.cli.verdicts import Cost, Verdict
from alora_serve.client import GenerationResult
from alora_serve.errors import AloraServeError
from alora_serve.types import AdapterInfo, Prompt

# --- actions that end in an event -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Have someone answer and show it as it comes; ``adapter`` is empty for the base model. Ends in Answered."""

    prompt: Prompt
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Judge:
    """Run these intrinsics and show each verdict as it comes. Ends in Judged.

    Attributes:
        whole: the prompt's conversation as messages: some intrinsics read what a handle hides.
    """

    prompt: Prompt
    whole: Prompt
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ListAdapters:
    """Find out and show which adapters there are. Ends in Listed."""


@dataclass(frozen=True, slots=True)
class Load:
    """Read a conversation. Ends in Loaded."""

    file: Path


@dataclass(frozen=True, slots=True)
class Save:
    """Write JSON and say so. Ends in Saved."""

    file: Path
    content: Mapping[str, Any]


# --- actions that only show -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """What the user asked for cannot be; says why."""

    problem: str


@dataclass(frozen=True, slots=True)
class Report:
    """Something failed and will not be tried again."""

    error: AloraServeError


@dataclass(frozen=True, slots=True)
class ShowUsage:
    """What the answers of the last turn cost, in order."""

    costs: tuple[Cost, ...]


@dataclass(frozen=True, slots=True)
class ShowHelp:
    """The commands."""


@dataclass(frozen=True, slots=True)
class Leave:
    """End the chat."""


Task = Answer | Judge | ListAdapters | Load | Save
"""What ends in an event."""

Shown = Note | Refuse | Report | ShowUsage | ShowHelp
"""What only shows something."""

Action = Task | Shown | Leave


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """The user typed a line."""

    text: str


@dataclass(frozen=True, slots=True)
class Answered:
    """Somebody answered."""

    result: GenerationResult


@dataclass(frozen=True, slots=True)
class Judged:
    """All intrinsics have found something or failed."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """These are the adapters."""

    adapters: tuple[AdapterInfo, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """This was in the file."""

    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Saved:
    """It was written."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The user stopped what was being done, or pressed Ctrl-C while nothing was. ``text`` had come until then."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not be done."""

    error: AloraServeError


@dataclass(frozen=True, slots=True)
class Ended:
    """There will be no more lines."""


Event = Line | Answered | Judged | Listed | Loaded | Saved | Stopped | Failed | Ended
