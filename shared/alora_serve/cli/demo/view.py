"""Shows the demo while it runs: as a conversation for people, or not at all for machines."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Final, Protocol

from rich.console import Console
from rich.padding import Padding
from rich.status import Status
from rich.table import Table
from rich.text import Text

from alora_serve.cli.demo.result import Answer, DemoResult
from alora_serve.cli.demo.script import ADAPTER
from alora_serve.cli.local.events import Exited, Listening, Notice, ProcessEvent
from alora_serve.types import ChatMessage

_SHOWN_CHARACTERS: Final = 600
_INDENT: Final = (0, 0, 0, 4)


class View(Protocol):
    """Told what happens, in order, on the event loop's thread."""

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

    def answering(self) -> None:
        """The base model begins to answer."""

    def text(self, text: str) -> None:
        """More of its answer."""

    def answered(self, answer: Answer) -> None:
        """An answer is complete: the base model's, or an adapter's verdict."""


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

    def answering(self) -> None:
        """See :class:`View`."""

    def text(self, text: str) -> None:
        """See :class:`View`."""

    def answered(self, answer: Answer) -> None:
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

    def answering(self) -> None:
        """See :class:`View`."""
        self.doing("")
        self._console.print(Text("assistant", "bold green"))
        self._console.print("    ", end="")

    def text(self, text: str) -> None:
        """See :class:`View`."""
        self._console.print(Text(text.replace("\n", "\n    ")), end="", soft_wrap=True)

    def answered(self, answer: Answer) -> None:
        """See :class:`View`."""
        self.doing("")
        if not answer.adapter:
            self._console.print()
            return
        verdict = Text.assemble(
            (f"{answer.adapter}? ", "bold magenta"),
            (" ".join(answer.text.split()) or "(nothing)", "bold"),
            (f"   first token after {_seconds(answer.ttft_seconds)}", "dim"),
        )
        self._console.print(verdict)

    def result(self, result: DemoResult) -> None:
        """What was measured, and how it compares with PEFT."""
        self.doing("")
        self._heading(f"what it cost ({result.dtype}, {result.threads} threads, as the client saw it)")
        self._console.print(_table(result))
        ratio = result.lora.seconds / result.adapter.seconds
        self._console.print(
            Text.assemble(
                "From the stored KV the adapter answers ",
                (f"{ratio:.0f} times sooner", "bold green"),
                f" than its plain LoRA twin, which computes all {result.lora.usage.computed_tokens:,} tokens itself.",
            )
        )
        if rest := result.warm_prefill.usage.computed_tokens:
            why = "what ends the assistant's turn after its text"
            self._console.print(f"The second prefill had {rest:,} tokens left to compute: {why}.")
        self._heading("the same tokens as stock PEFT, computing the same prompts cold?")
        for check in result.checks:
            mark = Text("equal", "bold green") if check.equal else Text("DIFFERENT", "bold red")
            self._indented(Text.assemble(mark, f"  {check.name}", (f"  PEFT: {check.detail}", "dim")))
        self._heading("go on")
        self._indented(Text("alora-serve up                    all services, until Ctrl-C"))
        self._indented(Text(f'alora-serve generate -a {ADAPTER} -m "..."   in another terminal'))

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


def _table(result: DemoResult) -> Table:
    table = Table()
    table.add_column("")
    for head in ("seconds", "tokens", "cached", "computed", "KiB fetched"):
        table.add_column(head, justify="right")
    for row in result.rows:
        usage = row.usage
        counts = (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens, usage.fetched_bytes >> 10)
        table.add_row(row.what, f"{row.seconds:.3f}", *(f"{count:,}" for count in counts))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
