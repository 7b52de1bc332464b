"""``make chaos``: breaks a real deployment in every way it must survive, and says what clients saw.

Every figure is from real processes over real sockets, on a tiny seeded model in float32, where tokens are promised
equal. Prints a table, writes build/chaos.json, and exits with 1 if a token was wrong, a request failed that another
replica, or a recompute, could have served, a fault did not do what it is for, or one was left out.

Examples:
  make chaos
  make chaos ARGS="--only 'worker hangs' --seed 7"
  make chaos ARGS="--short"                  every fault in miniature
  make chaos ARGS="--allow-missing"          where redis-server or the right to mount is missing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from faults import adapters, growth, lmdb_files, load, processes, stores, updates
from faults.harness import LEFT_OUT, CannotBreakError, Chaos, Row, Scenario, as_json
from rich.console import Console
from rich.table import Table

from deployment import save_tiny_model

SCENARIOS: Final[dict[str, Scenario]] = {
    **processes.SCENARIOS,
    **stores.SCENARIOS,
    **lmdb_files.SCENARIOS,
    **updates.SCENARIOS,
    **adapters.SCENARIOS,
    **load.SCENARIOS,
    **growth.SCENARIOS,
}
OUTPUT: Final = Path(__file__).resolve().parent.parent.parent / "build" / "chaos.json"


async def run(names: Sequence[str], seed: int, *, is_short: bool, console: Console) -> list[Row]:
    """The rows of these scenarios, one scenario after the other."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="alora-chaos-") as directory:
        model = save_tiny_model(Path(directory))
        for number, name in enumerate(names, start=1):
            console.print(f"[dim]{number}/{len(names)}[/dim] {name}")
            try:
                found = await SCENARIOS[name](Chaos(model, seed, is_short, Path(directory)))
            except (CannotBreakError, pytest.skip.Exception) as error:  # tests' helpers skip what the machine lacks
                console.print(f"    left out: {error}", style="yellow")
                found = [Row(name, 0, 0, 0, None, {LEFT_OUT: str(error)})]
            except Exception as error:  # noqa: BLE001  # others go on, and what broke counts
                console.print_exception()
                found = [Row(name, 0, 1, 0, None, {"first_failure": f"{type(error).__name__}: {error}"})]
            rows += found
            write(rows)
            for row in found:
                console.print(
                    f"    {row.requests} requests, {row.failed} failed, {row.wrong_tokens} wrong", style="dim"
                )
    return rows


def write(rows: Sequence[Row]) -> None:
    """The file, after each scenario: a run that is cut off was not for nothing."""
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(as_json(rows), indent=2) + "\n")


def show(rows: Sequence[Row], console: Console) -> None:
    """A table."""
    table = Table(title="Faults under load")
    for column in ("fault", "requests", "failed", "wrong tokens", "recovery, s", "besides"):
        table.add_column(column, justify="left" if column in ("fault", "besides") else "right")
    for row in rows:
        recovery = "" if row.recovery_seconds is None else f"{row.recovery_seconds:.1f}"
        besides = ", ".join(f"{name} {value}" for name, value in row.details.items())
        table.add_row(row.fault, str(row.requests), str(row.failed), str(row.wrong_tokens), recovery, besides)
    console.print(table)


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="FAULT")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--short", action="store_true", help="a few faults of each kind")
    parser.add_argument("--allow-missing", action="store_true", help="succeed though faults were left out")
    parser.add_argument("--list", action="store_true", help="print the faults and exit")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(SCENARIOS))
        return
    console = Console(stderr=True, quiet=arguments.json)
    rows = asyncio.run(run(arguments.only, arguments.seed, is_short=arguments.short, console=console))
    if not arguments.json:
        show(rows, Console(width=None if sys.stdout.isatty() else 180))
    print(OUTPUT)
    left_out = not arguments.allow_missing and any(LEFT_OUT in row.details for row in rows)
    if left_out or any(row.wrong_tokens or row.failed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
