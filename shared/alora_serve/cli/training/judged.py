"""What `eval` reads and shows, and how two evaluations compare."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alora_serve.cli.output import console, print_table
from alora_serve.errors import ConfigError
from alora_serve.evaluation.bootstrap import Difference
from alora_serve.evaluation.items import Item
from alora_serve.evaluation.report import SCORES, Report
from alora_serve.training.rows import Row, read_rows


def parse_thresholds(given: Sequence[str]) -> dict[str, float]:
    """Bounds written ``METRIC=VALUE``.

    Raises:
        ConfigError: one is written otherwise, its value is no finite number, or no evaluation has such a figure.
    """
    bounds = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            bounds[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--threshold {text} is not METRIC=VALUE") from error
        if not math.isfinite(bounds[name]):
            raise ConfigError(f"--threshold {text}: {value} is no bound")
        if name not in SCORES:
            raise ConfigError(f"--threshold {text}: there is no such figure, only {', '.join(SCORES)}")
    return bounds


def read_test_rows(files: Sequence[Path], limit: int | None) -> list[Row]:
    """Rows of all files.

    Raises:
        ConfigError: there are none, or two have one id, by which evaluations are compared.
    """
    rows = [row for path in files for row in read_rows(path)][:limit]
    if not rows:
        raise ConfigError(f"no rows in {', '.join(map(str, files))}")
    seen: set[str] = set()
    for row in rows:
        if row.row_id in seen:
            raise ConfigError(f"two rows have the id {row.row_id}")
        seen.add(row.row_id)
    return rows


@contextmanager
def progress(total: int) -> Iterator[Callable[[Item], None]]:
    """A bar on standard error that is told each answer, from any thread."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("asking", total=total)
        yield lambda item: bar.advance(task)


def write(path: Path, everything: Mapping[str, Any]) -> None:
    """Write an evaluation for `compare`.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(everything, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def show_report(report: Report) -> None:
    """Figures with their intervals, then by source, then what calls cost."""
    rows = [
        {"metric": name, "value": f"{e.value:.4f}", "95 % interval": f"{e.low:.4f} to {e.high:.4f}"}
        for name, e in report.metrics.items()
    ]
    print_table(f"{report.adapter or 'base model'}, {report.items} items", rows)
    out = console()
    if report.majority is not None:
        out.print(f"always the most frequent answer: accuracy {report.majority:.4f}", markup=False)
    if len(report.by_source) > 1:
        main = next(iter(report.metrics))
        sources = [{"source": s, main: f"{value:.4f}", "items": n} for s, (value, n) in report.by_source.items()]
        print_table("", sources)
    if report.failed:
        out.print(f"{report.failed} answers could not be read: wrong, and left out of what follows", markup=False)
    out.print(
        f"a call: {report.mean_seconds:.3f} s, first token after {report.mean_first_token_seconds:.3f} s, "
        f"{report.mean_prompt_tokens:.0f} prompt tokens, {report.mean_cached_tokens:.0f} of them cached",
        markup=False,
    )


def show_differences(differences: Mapping[str, Difference]) -> None:
    """First minus second, for each figure."""
    rows = [
        {
            "metric": name,
            "first minus second": f"{d.value:+.4f}",
            "95 % interval": f"{d.low:+.4f} to {d.high:+.4f}",
            "p": f"{d.p_value:.3f}",
        }
        for name, d in differences.items()
    ]
    print_table("paired bootstrap over items", rows)
