"""What every scenario shares: rounds, medians, the machine's description, a table and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "build" / "bench"
_PACKAGES = ("alora-serve", "torch", "transformers", "peft", "grpcio")


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call, in seconds: to the first token, and to the last."""

    first_token_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """All counted rounds of one way of serving at one length.

    Attributes:
        system: what was timed, in words.
        prompt_tokens: length of the conversation.
        fetched_bytes: KV read from the store by a call; 0 where none.
    """

    system: str
    prompt_tokens: int
    samples: tuple[Sample, ...]
    fetched_bytes: int = 0

    def median(self, what: str) -> float:
        """Median of ``first_token_seconds`` or ``total_seconds``."""
        return statistics.median(getattr(sample, what) for sample in self.samples)

    def spread(self, what: str) -> tuple[float, float]:
        """Smallest and largest of the same."""
        values = [getattr(sample, what) for sample in self.samples]
        return min(values), max(values)


def machine() -> dict[str, object]:
    """What the figures depend on besides the code."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def show(rows: Sequence[Row], *, baseline: str, console: Console) -> None:
    """Print a table; the last column says how many times faster than ``baseline`` at the same length."""
    table = Table(title="Adapter output of 16 tokens: medians (smallest-largest) in seconds")
    for column in ("tokens", "system", "first token", "end to end", "fetched", "against recompute"):
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=column != "system")
    for row in rows:
        slow = next(r for r in rows if r.system == baseline and r.prompt_tokens == row.prompt_tokens)
        ratio = slow.median("first_token_seconds") / row.median("first_token_seconds")
        table.add_row(
            f"{row.prompt_tokens:,}",
            row.system,
            _figure(row, "first_token_seconds"),
            _figure(row, "total_seconds"),
            f"{row.fetched_bytes / 1e6:.1f} MB" if row.fetched_bytes else "",
            f"{ratio:.1f}x",
        )
    console.print(table)


def _figure(row: Row, what: str) -> str:
    low, high = row.spread(what)
    return f"{row.median(what):.3f} ({low:.3f}-{high:.3f})"


def write(name: str, rows: Sequence[Row], facts: Mapping[str, object]) -> Path:
    """Write ``build/bench/<name>.json``: facts, and for each row all samples and their medians."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.json"
    content = {
        **facts,
        "machine": machine(),
        "rows": [
            {
                **asdict(row),
                "first_token_seconds_median": row.median("first_token_seconds"),
                "total_seconds_median": row.median("total_seconds"),
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
