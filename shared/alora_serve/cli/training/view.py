"""Shows a training: a bar with loss and time left, lines for what happens, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from alora_serve.cli.output import console
from alora_serve.errors import ConfigError

_LINE_SECONDS: Final = 30.0
"""Between lines where there is no terminal to draw a bar on."""

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from alora_serve.training.run import RunResult


def parse_labels(given: Sequence[str]) -> tuple[tuple[str, ...], dict[str, float]]:
    """Labels, and the values of those written ``LABEL=VALUE``.

    Raises:
        ConfigError: a value is no number.
    """
    labels, values = [], {}
    for text in given:
        label, equals, value = text.rpartition("=")
        labels.append(label if equals else text)
        if equals:
            try:
                values[label] = float(value)
            except ValueError as error:
                raise ConfigError(f"--label {text}: {value!r} is no number") from error
    return tuple(labels), values


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._said = time.monotonic()

    def note(self, text: str) -> None:
        """See :class:`alora_serve.training.run.View`."""
        self._bar.console.print(text, markup=False, highlight=False)

    def step(self, step: int, total_steps: int, loss: float) -> None:
        """See :class:`alora_serve.training.run.View`."""
        if not self._bar.console.is_terminal and time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            self.note(f"step {step} of {total_steps}, loss {loss:.3f}")
        self._bar.update(self._task, description=f"loss {loss:.3f}", completed=step, total=total_steps)


@contextmanager
def training_view() -> Iterator[_Bar]:
    """A bar on standard error while the block runs."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task("preparing", total=None))


def show_result(result: RunResult) -> None:
    """One line about what was written."""
    last = result.trained.validation[-1] if result.trained.validation else {}
    measured = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
    console().print(
        f"{result.output}: {result.trained.rows} rows, {result.trained.steps} steps, "
        f"{result.trained.cpu_seconds:.0f} CPU-seconds; validation {measured or 'none kept'}",
        markup=False,
    )
