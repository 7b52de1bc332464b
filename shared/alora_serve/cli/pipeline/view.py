"""Shows what a pipeline found and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alora_serve.cli.pipeline.result import Report, Step

_NOT_MEASURED: Final = "—"


def show_missing(console: Console, missing: Sequence[str]) -> None:
    """Which intrinsics will not be asked, if any."""
    if missing:
        console.print(Text(f"not served here, so not asked: {', '.join(missing)}", "yellow"), soft_wrap=True)


def show_step(console: Console, step: Step) -> None:
    """One line, as soon as it is done."""
    spent, found = step.spent, " ".join(step.found.split())
    cost = f"{spent.seconds:.2f} s, {spent.computed_tokens:,} of {spent.prompt_tokens:,} tokens computed"
    line = Text.assemble((f"{step.what} ", "magenta"), (f"{found}  " if found else "", "bold"), (cost, "dim"))
    console.print(line, soft_wrap=True)


def show_reply(console: Console, text: str, warnings: Sequence[str]) -> None:
    """What the user of the pipeline gets."""
    console.print(Text.assemble(("reply: ", "bold green"), text), soft_wrap=True)
    for warning in warnings:
        console.print(Text(f"beware: {warning}", "yellow"), soft_wrap=True)


def show_report(console: Console, report: Report) -> None:
    """A table of all steps, and what their plain LoRA twins took."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for head in ("seconds", "cached", "fetched", "computed", "LoRA s", "computed"):
        table.add_column(head, justify="right")
    for step in report.steps:
        spent, other = step.spent, step.recomputed
        counts = (spent.cached_tokens, spent.fetched_tokens, spent.computed_tokens)
        twin = (f"{other.seconds:.3f}", f"{other.computed_tokens:,}") if other else (_NOT_MEASURED, _NOT_MEASURED)
        table.add_row(Text(step.what), f"{spent.seconds:.3f}", *(f"{count:,}" for count in counts), *twin)
    console.print(table)
    if report.compared:
        console.print(_comparison(report), soft_wrap=True)


def _comparison(report: Report) -> Text:
    ours, twins = zip(*report.compared, strict=True)
    seconds, others = sum(spent.seconds for spent in ours), sum(spent.seconds for spent in twins)
    computed, recomputed = (sum(spent.computed_tokens for spent in each) for each in (ours, twins))
    asked = "that question" if len(ours) == 1 else f"those {len(ours)} steps"
    return Text.assemble(
        f"Asked of plain LoRAs, {asked} took {others:.2f} s and computed {recomputed:,} tokens; "
        f"from the conversation's KV, {seconds:.2f} s and {computed:,} tokens: ",
        (f"{others / seconds:.1f} times sooner", "bold green"),
        ".",
    )
