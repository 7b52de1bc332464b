"""``make bench-pictures``: draws what ``make bench-peers`` measured, from build/bench/ into docs/images/.

* ttft-by-context.svg: time to an adapter's first token against the conversation's length (scenario a);
* cost-by-adapters.svg: a fan-out, end to end, against the number of adapters (scenario a);
* throughput-by-concurrency.svg: finished questions a second against how many were in flight (scenario c).

A picture whose scenario was not measured is left out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from harness import OUTPUT, REPOSITORY

IMAGES = REPOSITORY / "docs" / "images"
Lines = dict[str, list[tuple[float, float]]]
"""Points of each system, in order of x."""


def lines(rows: list[dict[str, Any]], x: str, y: str) -> Lines:
    """Points by system; ``x`` and ``y`` are fields of a row or of its details."""
    found: Lines = defaultdict(list)
    for row in rows:
        values = {**row["details"], **row}
        found[row["system"]].append((_middle(values[x]), _middle(values[y])))
    return {system: sorted(points) for system, points in found.items()}


def _middle(value: float | list[float]) -> float:
    """Of a figure that there is one of a round, the median."""
    return median(value) if isinstance(value, list) else value


def contexts(rows: list[dict[str, Any]]) -> Lines:
    """First token of one adapter by length, lengths rounded to the hundred that was asked for."""
    return lines([row for row in rows if row["adapters"] == 1], "prompt_tokens", "first_token_seconds_median")


def costs(rows: list[dict[str, Any]]) -> Lines:
    """A whole fan-out by number of adapters, at the length nearest to 2,048 tokens."""
    nearest = min((row["prompt_tokens"] for row in rows), key=lambda tokens: abs(tokens - 2048))
    near = [row for row in rows if abs(row["prompt_tokens"] - nearest) <= nearest // 10]
    return lines(near, "adapters", "total_seconds_median")


def throughputs(rows: list[dict[str, Any]]) -> Lines:
    """Finished questions a second by mean number in flight."""
    return lines(rows, "mean_in_flight", "completed_per_second")


def draw(path: Path, found: Lines, *, title: str, x: str, y: str, logarithmic: bool) -> None:
    """One picture."""
    import matplotlib as mpl

    mpl.use("svg")
    # The same rows give the same file.
    mpl.rcParams["svg.hashsalt"] = "alora-serve"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for system, points in found.items():
        ours = system.startswith("ours")
        axes.plot(*zip(*points, strict=True), marker="o", label=system, linewidth=2 if ours else 1.2)
    axes.set(title=title, xlabel=x, ylabel=y)
    if logarithmic:
        axes.set(xscale="log", yscale="log")
        ticks = sorted({point[0] for points in found.values() for point in points})
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="directory (default: docs/images)")
    parser.add_argument("--quick", action="store_true", help="draw the rows of --quick runs")
    arguments = parser.parse_args()
    suffix = "-quick" if arguments.quick else ""
    pictures = (
        ("a", "ttft-by-context", contexts, "First token of an adapter", "tokens of the conversation", "seconds", True),
        ("a", "cost-by-adapters", costs, "All answers of a fan-out", "adapters", "seconds", True),
        ("c", "throughput-by-concurrency", throughputs, "Questions finished", "in flight", "a second", False),
    )
    for scenario, name, points, title, x, y, logarithmic in pictures:
        source = OUTPUT / f"scenario-{scenario}{suffix}.json"
        if not source.exists():
            print(
                f"{name}: not drawn, {source} is not there; make bench-peers ARGS='--scenario {scenario}' measures it"
            )
            continue
        found = points(json.loads(source.read_text())["rows"])
        path = arguments.out / f"{name}.svg"
        draw(path, found, title=title, x=x, y=y, logarithmic=logarithmic)
        print(path)


if __name__ == "__main__":
    main()
