from __future__ import annotations

from io import StringIO
from itertools import groupby
from pathlib import Path

import pytest
from adapters import NAMES, Adapter
from harness import Sample
from lineup import Bench
from rich.console import Console
from rich.progress import Progress
from scenarios import arrivals
from systems.base import Answer, Warmed
from tables import rows_table

from alora_serve.types import TokenIds
from word_renderer import WordRenderer

ADAPTERS = [Adapter(name, Path(name), Path(f"{name}-lora"), (number,)) for number, name in enumerate(NAMES[:5])]


def test_arrivals_come_at_the_rate_in_order_and_within_the_time() -> None:
    plan = arrivals.Plan(seconds=2000.0)

    found = arrivals.arrivals(2.0, plan, seed=1)

    assert len(found) == pytest.approx(4000, rel=0.1)
    times = [arrival.at_seconds for arrival in found]
    assert times == sorted(times)
    assert times[-1] < plan.seconds
    assert {arrival.conversation for arrival in found} == set(range(plan.conversations))


def test_adapters_are_drawn_by_zipfs_law() -> None:
    found = arrivals.arrivals(2.0, arrivals.Plan(seconds=4000.0), seed=2)

    counts = [sum(arrival.adapter == adapter for arrival in found) for adapter in range(5)]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.15)
    assert counts[0] / counts[4] == pytest.approx(5, rel=0.2)


def test_arrivals_are_the_same_for_every_system() -> None:
    assert arrivals.arrivals(1.0, arrivals.Plan(), seed=3) == arrivals.arrivals(1.0, arrivals.Plan(), seed=3)


@pytest.mark.parametrize(
    ("completed", "first_token_seconds", "saturated"), [(1.8, 1.0, False), (1.7, 1.0, True), (2.0, 10.1, True)]
)
def test_a_system_is_saturated_when_it_falls_behind(
    completed: float, first_token_seconds: float, saturated: bool
) -> None:
    assert arrivals.saturated(2.0, completed, first_token_seconds) is saturated


@pytest.mark.parametrize(
    ("found", "over"),
    [([True], False), ([False, True], False), ([True, False, True], False), ([False, True, True], True)],
)
def test_rates_rise_until_a_system_is_saturated_twice_in_a_row(found: list[bool], over: bool) -> None:
    assert arrivals.is_over(found) is over


def test_a_rate_is_counted_from_the_first_to_the_last() -> None:
    assert arrivals.per_second([10.0, 14.0, 11.0, 12.0, 13.0]) == 1.0


def test_a_row_of_arrivals_has_all_answers_and_a_figure_a_round() -> None:
    slow, quick = Sample(0.5, 4.0), Sample(0.1, 1.0)
    rounds = [
        arrivals.Round((quick, quick), offered=2.0, completed=2.0, seconds=3.0),
        arrivals.Round((slow, slow), offered=2.0, completed=0.5, seconds=9.0),
        arrivals.Round((quick, slow), offered=2.0, completed=1.9, seconds=4.0),
    ]

    row = arrivals.row_of("ours", 2048, 2.0, rounds, answer_tokens=16)

    assert row.samples == (quick, quick, slow, slow, quick, slow)
    assert row.details["completed_per_second"] == [2.0, 0.5, 1.9]
    assert row.details["mean_in_flight"] == [2.0, 2.0, 4.75]
    assert row.details["saturated"] is False, "the median round is not"
    table = rows_table([row], baseline="", details=arrivals.DETAILS)
    assert "1.90 (0.50-2.00)" in table


class CountedSystem:
    """Answers at once, or never keeps up, and writes down whose turn it was."""

    plain = False

    def __init__(self, name: str, turns: list[str], *, never_keeps_up: bool) -> None:
        self.name, self._turns = name, turns
        self._seconds = arrivals.SATURATED_FIRST_TOKEN_SECONDS + 1 if never_keeps_up else 0.0

    async def warm(self, prefix: TokenIds) -> Warmed:
        return Warmed(len(prefix), 0.1)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        if max_tokens > 1:
            self._turns.append(self.name)
        return Answer((1,) * max_tokens, self._seconds, self._seconds)


async def test_systems_take_turns_at_each_rate_until_they_are_saturated_twice(tmp_path: Path) -> None:
    console, asked = Console(file=StringIO()), list[str]()
    systems = {name: CountedSystem(name, asked, never_keeps_up=name == "slow") for name in ("quick", "slow")}
    bench = Bench(console, Progress(console=console), tmp_path, "float32", tuple(ADAPTERS), WordRenderer())  # type: ignore[arg-type]
    plan = arrivals.Plan(tokens=8, conversations=2, rates=(100, 200, 400), seconds=0.05, rounds=2)

    rows = await arrivals.run(bench, systems, plan)  # type: ignore[arg-type]

    assert [(row.system, row.what) for row in rows] == [
        *(("quick", f"{rate}/s") for rate in (100, 200, 400)),
        *(("slow", f"{rate}/s") for rate in (100, 200)),
    ]
    assert [name for name, _ in groupby(asked)] == ["quick", "slow"] * 4 + ["quick"]
    assert all(len(row.details["completed_per_second"]) == 2 for row in rows)  # type: ignore[arg-type]
    assert len(bench.answers.kept) == len(rows)


def test_there_is_a_rate_to_count_however_short_the_time() -> None:
    assert len(arrivals.arrivals(0.01, arrivals.Plan(seconds=1.0), seed=6)) == 2
