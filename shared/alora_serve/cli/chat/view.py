"""Shows a chat: to people as text, to machines as one JSON object a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alora_serve.cli.chat.commands import COMMANDS
from alora_serve.cli.output import error_to_json, print_error, print_json
from alora_serve.cli.verdicts import Cost, Verdict
from alora_serve.client import GenerationResult
from alora_serve.errors import AloraServeError
from alora_serve.types import AdapterInfo, FinishReason, ModelInfo


class View(Protocol):
    """Told what happens, in order, on one thread. ``who`` is an adapter's name, empty for the base model."""

    def ready(self, model: ModelInfo, adapters: Sequence[AdapterInfo]) -> None:
        """The chat begins."""

    def waiting(self) -> None:
        """The next line is awaited; all that the last one led to has been shown."""

    def text(self, who: str, text: str) -> None:
        """More of an answer."""

    def answered(self, who: str, result: GenerationResult) -> None:
        """The answer is complete."""

    def broken_off(self, who: str, text: str) -> None:
        """The answer will not be complete; ``text`` had come."""

    def verdict(self, verdict: Verdict) -> None:
        """What an intrinsic found."""

    def adapters(self, adapters: Sequence[AdapterInfo]) -> None:
        """All adapters."""

    def usage(self, costs: Sequence[Cost]) -> None:
        """What the last turn cost."""

    def commands(self) -> None:
        """What can be typed."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def refused(self, problem: str) -> None:
        """What was typed cannot be done."""

    def failed(self, error: AloraServeError) -> None:
        """A call or a file failed."""


class PeopleView:
    """Answers and verdicts on one console, all else on another: in a pipe, the first is standard output alone."""

    def __init__(self, out: Console, err: Console) -> None:
        self._out = out
        self._err = err
        self._speaking = False

    def ready(self, model: ModelInfo, adapters: Sequence[AdapterInfo]) -> None:
        """See :class:`View`."""
        names = ", ".join(adapter.name for adapter in adapters) or "none"
        self.note(f"{model.name}, {model.dtype}, up to {model.context_tokens:,} tokens; adapters: {names}")
        self.note("/help shows what can be done")

    def waiting(self) -> None:
        """See :class:`View`."""

    def text(self, who: str, text: str) -> None:
        """See :class:`View`."""
        self._begin(who)
        self._out.print(Text(text, "bold" if who else ""), end="", soft_wrap=True)

    def answered(self, who: str, result: GenerationResult) -> None:
        """See :class:`View`."""
        self._begin(who)
        self._end()
        if result.finish_reason is FinishReason.LENGTH:
            self.note(f"cut off after {result.usage.generated_tokens} tokens: --max-tokens allows more")

    def broken_off(self, who: str, text: str) -> None:
        """See :class:`View`."""
        self._end()

    def verdict(self, verdict: Verdict) -> None:
        """See :class:`View`."""
        if verdict.error is not None:
            found = Text(str(verdict.error), "red")
        else:
            found = Text(verdict.shown or "(nothing)", "bold")
        self._out.print(Text.assemble((f"{verdict.name}: ", "magenta"), found), soft_wrap=True)

    def adapters(self, adapters: Sequence[AdapterInfo]) -> None:
        """See :class:`View`."""
        for adapter in adapters:
            what = (
                adapter.problem
                or f"{adapter.kind}, rank {adapter.rank}{', intrinsic' * bool(adapter.intrinsic_digest)}"
            )
            self._out.print(Text.assemble((adapter.name, "bold"), f"  {what}"), soft_wrap=True)
        if not adapters:
            self.note("there are no adapters")

    def usage(self, costs: Sequence[Cost]) -> None:
        """See :class:`View`."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for head in ("prompt", "cached", "fetched", "computed", "generated", "first", "total"):
            table.add_column(head, justify="right")
        for cost in costs:
            usage, timings = cost.usage, cost.timings
            tokens = (usage.prompt_tokens, usage.cached_tokens, usage.fetched_tokens, usage.computed_tokens)
            table.add_row(
                Text(cost.who or "base"),
                *(f"{count:,}" for count in (*tokens, usage.generated_tokens)),
                *(f"{seconds:.3f} s" for seconds in (timings.first_token_seconds, timings.total_seconds)),
            )
        self._out.print(table)
        self.note("tokens, the fetched among the cached; time to the first token and in all")

    def commands(self) -> None:
        """See :class:`View`."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for command in COMMANDS:
            table.add_row(Text(command.usage, "bold"), Text(command.meaning))
        self._out.print(table)
        self.note(
            "anything else is said to the base model; // begins a turn with /. On a terminal, Alt-Enter breaks lines "
            "and Tab completes. Ctrl-C stops an answer; twice, it leaves"
        )

    def note(self, text: str) -> None:
        """See :class:`View`."""
        self._err.print(Text(f"({text})", "dim"), soft_wrap=True)

    def refused(self, problem: str) -> None:
        """See :class:`View`."""
        self._err.print(Text(problem, "yellow"), soft_wrap=True)

    def failed(self, error: AloraServeError) -> None:
        """See :class:`View`."""
        print_error(error)

    def _begin(self, who: str) -> None:
        if who and not self._speaking:
            self._out.print(Text(f"{who}? ", "magenta"), end="")
        self._speaking = True

    def _end(self) -> None:
        self._out.print()
        self._speaking = False


class JsonView:
    """Prints an object for everything that happens; ``event`` says what."""

    def ready(self, model: ModelInfo, adapters: Sequence[AdapterInfo]) -> None:
        """See :class:`View`."""
        self._print("ready", model=model, adapters=adapters)

    def waiting(self) -> None:
        """See :class:`View`."""
        self._print("waiting")

    def text(self, who: str, text: str) -> None:
        """See :class:`View`."""
        self._print("text", adapter=who, text=text)

    def answered(self, who: str, result: GenerationResult) -> None:
        """See :class:`View`."""
        self._print(
            "answer",
            adapter=who,
            text=result.text,
            finish_reason=result.finish_reason,
            usage=result.usage,
            timings=result.timings,
        )

    def broken_off(self, who: str, text: str) -> None:
        """See :class:`View`."""
        self._print("broken_off", adapter=who, text=text)

    def verdict(self, verdict: Verdict) -> None:
        """See :class:`View`."""
        if verdict.error is not None:
            self._print("verdict", intrinsic=verdict.name, error=error_to_json(verdict.error))
            return
        cost = {"usage": verdict.cost.usage, "timings": verdict.cost.timings} if verdict.cost else {}
        self._print("verdict", intrinsic=verdict.name, value=verdict.value, text=verdict.text, **cost)

    def adapters(self, adapters: Sequence[AdapterInfo]) -> None:
        """See :class:`View`."""
        self._print("adapters", adapters=adapters)

    def usage(self, costs: Sequence[Cost]) -> None:
        """See :class:`View`."""
        listed = [{"adapter": cost.who, "usage": cost.usage, "timings": cost.timings} for cost in costs]
        self._print("usage", costs=listed)

    def commands(self) -> None:
        """See :class:`View`."""
        self._print("help", commands=[{"usage": command.usage, "meaning": command.meaning} for command in COMMANDS])

    def note(self, text: str) -> None:
        """See :class:`View`."""
        self._print("note", text=text)

    def refused(self, problem: str) -> None:
        """See :class:`View`."""
        self._print("refused", problem=problem)

    def failed(self, error: AloraServeError) -> None:
        """See :class:`View`."""
        self._print("error", error=error_to_json(error))

    def _print(self, event: str, **fields: Any) -> None:
        print_json({"event": event, **fields})
