"""Shows the demo while it runs: as a conversation for people, or not at all for machines."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from rich.console import Console
from rich.padding import Padding
from rich.status import Status
from rich.text import Text

from alora_serve.cli.demo.result import DemoResult
from alora_serve.cli.local.events import Exited, Listening, Notice, ProcessEvent
from alora_serve.cli.pipeline.result import Step
from alora_serve.cli.pipeline.view import show_reply, show_report, show_step
from alora_serve.types import ChatMessage

_SHOWN_CHARACTERS: Final = 600
_INDENT: Final = (0, 0, 0, 4)


class View(Protocol):
    """Told what happens, in order; from another thread than the event loop's while the pipeline runs."""

    def doing(self, what: str) -> None:
        """Something begins that takes a while; empty when it has ended."""

    def note(self, text: str) -> None:
        """Something the reader should know to follow."""

    def process(self, event: ProcessEvent) -> None:
        """Something happened to a service's process."""

    def listening(self, processes: Mapping[str, Listening], source: str) -> None:
        """The services answer, and the conversation begins; ``source`` says where its document is from."""

    def turn(self, message: ChatMessage) -> None:
        """A turn of the conversation that nobody generated."""

    def step(self, step: Step) -> None:
        """A step of the pipeline is done."""

    def reply(self, text: str, warnings: Sequence[str]) -> None:
        """The pipeline has an answer for its user."""


class SilentView:
    """Shows nothing."""

    def doing(self, what: str) -> None:
        """See :class:`View`."""

    def note(self, text: str) -> None:
        """See :class:`View`."""

    def process(self, event: ProcessEvent) -> None:
        """See :class:`View`."""

    def listening(self, processes: Mapping[str, Listening], source: str) -> None:
        """See :class:`View`."""

    def turn(self, message: ChatMessage) -> None:
        """See :class:`View`."""

    def step(self, step: Step) -> None:
        """See :class:`View`."""

    def reply(self, text: str, warnings: Sequence[str]) -> None:
        """See :class:`View`."""


class ProgressView(SilentView):
    """Says what is being done, and what goes wrong with processes, a line each: beside the object for machines."""

    def __init__(self, console: Console) -> None:
        """``console`` is standard error's."""
        self._console = console

    def doing(self, what: str) -> None:
        """See :class:`View`."""
        if what:
            self._console.print(Text(what, "dim"))

    def process(self, event: ProcessEvent) -> None:
        """See :class:`View`."""
        _show_trouble(self._console, event)


class RichView:
    """Shows the conversation as it goes."""

    def __init__(self, console: Console, status: Status) -> None:
        """``status`` turns while something is awaited; it shows on terminals only."""
        self._console = console
        self._status = status

    def doing(self, what: str) -> None:
        """See :class:`View`."""
        if not what:
            self._status.stop()
        elif self._console.is_terminal:
            self._status.update(what)
            self._status.start()
        else:
            self.note(what)

    def note(self, text: str) -> None:
        """See :class:`View`."""
        self._console.print(Text(f"({text})", "dim"))

    def process(self, event: ProcessEvent) -> None:
        """See :class:`View`."""
        _show_trouble(self._console, event)

    def listening(self, processes: Mapping[str, Listening], source: str) -> None:
        """See :class:`View`."""
        self.doing("")
        self._heading("three services, each a process of its own")
        for name, process in processes.items():
            self._indented(Text(f"{name:<9} pid {process.pid:<7} gRPC {process.address:<16} ", "dim"))
        self._heading("the conversation")
        self._indented(Text(source, "dim"))

    def turn(self, message: ChatMessage) -> None:
        """See :class:`View`."""
        text = message.content
        if len(text) > _SHOWN_CHARACTERS:
            half = _SHOWN_CHARACTERS // 2
            text = f"{text[:half]} [... {len(text) - 2 * half:,} more characters ...] {text[-half:]}"
        self._console.print(Text(message.role, "bold cyan"))
        self._indented(Text(text))

    def step(self, step: Step) -> None:
        """See :class:`View`."""
        self.doing("")
        show_step(self._console, step)

    def reply(self, text: str, warnings: Sequence[str]) -> None:
        """See :class:`View`."""
        self.doing("")
        show_reply(self._console, text, warnings)

    def result(self, result: DemoResult, seconds: float) -> None:
        """What was measured, and how it compares with PEFT; ``seconds`` is what all of the demo took."""
        self.doing("")
        self._heading(f"what each step cost ({result.dtype}, {result.threads} threads, as the client saw it)")
        show_report(self._console, result.report)
        self._heading("the same tokens as stock PEFT, computing the same prompts cold?")
        for check in result.checks:
            mark = Text("equal", "bold green") if check.equal else Text("DIFFERENT", "bold red")
            theirs = "" if check.equal else f"  PEFT: {check.detail}"
            self._indented(Text.assemble(mark, f"  {check.name}", (theirs, "dim")))
        self._heading("go on")
        self._indented(Text("alora-serve up                all services, until Ctrl-C"))
        self._indented(Text("alora-serve chat              in another terminal: try /intrinsics"))
        self._indented(Text("python examples/rag_guard.py  this pipeline on a question of yours: --question"))
        self._console.print()
        self._console.print(f"all of it took {seconds:.0f} s", highlight=False)

    def _heading(self, text: str) -> None:
        self._console.print()
        self._console.rule(Text(text, "bold"), align="left")

    def _indented(self, text: Text) -> None:
        self._console.print(Padding(text, _INDENT))


def _show_trouble(console: Console, event: ProcessEvent) -> None:
    match event:
        case Exited(expected=False):
            how = f"exit status {event.status}" if event.status >= 0 else signal.Signals(-event.status).name
            console.print(Text(f"{event.name} died: {how}", "bold red"))
        case Notice():
            console.print(Text(event.message, "yellow"))
