"""What a command prints: text for people or JSON for machines, and errors as one clear line, never a traceback."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import typer

from alora_serve.errors import AloraServeError

if TYPE_CHECKING:
    from rich.console import Console

    from alora_serve.client import GenerationResult

FAILURE_EXIT_CODE = 1


def console(*, stderr: bool = False) -> Console:
    """Where text for people goes. Imported late: a machine's caller never pays for it."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_json(value: object) -> None:
    """One JSON value on one line, at once."""
    sys.stdout.write(json.dumps(to_json(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A table for people; the keys of the first row are the heads. The first column is never folded."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for index, (name, value) in enumerate((rows[0] if rows else {}).items()):
        justify: Literal["left", "right"] = "right" if isinstance(value, int | float) else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(value if isinstance(value, Text) else Text(str(value)) for value in row.values()))
    console().print(table)


def print_top_logprobs(result: GenerationResult) -> None:
    """What the model thought of each token, where it was asked."""
    rows = [
        {
            "token": repr(spelt.decode(errors="replace")),
            "logprob": f"{logprob:.3f}",
            "likeliest": "  ".join(f"{token.text!r} {token.logprob:.3f}" for token in top),
        }
        for spelt, logprob, top in zip(result.token_bytes, result.logprobs, result.top_logprobs, strict=False)
    ]
    if rows:
        print_table("", rows)


def to_json(value: object) -> Any:
    """Domain objects as JSON values: dataclasses as objects, bytes as hex, enums as their values, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


@contextmanager
def errors_reported(*, as_json: bool) -> Iterator[None]:
    """Print an error of ours that leaves the block and exit with status 1; Ctrl-C exits with 130.

    For machines it is ``{"error": {...}}`` on standard output, otherwise lines on standard error.
    """
    try:
        yield
    except AloraServeError as error:
        if as_json:
            print_json({"error": error_to_json(error)})
        else:
            print_error(error)
        raise typer.Exit(FAILURE_EXIT_CODE) from error
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(130) from interrupt


def error_to_json(error: AloraServeError) -> dict[str, Any]:
    """What a caller may switch on, and what a person may read."""
    return {
        "status": error.status,
        "reason": error.reason,
        "message": str(error),
        "violations": to_json(error.violations),
        "retry_after_seconds": error.retry_after_seconds,
        "metadata": error.metadata,
    }


def print_error(error: AloraServeError) -> None:
    """An error for people, on standard error."""
    from rich.text import Text

    out = console(stderr=True)
    out.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    for violation in error.violations:
        line = f"{violation.field}: {violation.description}"
        if line not in str(error):
            out.print(Text(f"  {line}"), soft_wrap=True)
    if error.retry_after_seconds is not None:
        out.print(Text(f"  retry in {error.retry_after_seconds:g} s"), soft_wrap=True)
    if "request_id" in error.metadata:
        out.print(Text(f"  request id {error.metadata['request_id']}", style="dim"), soft_wrap=True)
