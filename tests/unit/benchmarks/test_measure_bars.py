from __future__ import annotations

import argparse
import json
from io import StringIO
from pathlib import Path

import harness
import measure_bars
import pytest
from adapters import Adapter
from bars import BARS, BESIDE, beside, evaluate
from correctness import RowKey, key_of
from harness import Correct, Row, Sample
from lineup import SYSTEMS, Bench
from rich.console import Console
from rich.progress import Progress
from systems.base import Answer, Warmed

from alora_serve.types import TokenIds
from word_renderer import WordRenderer

ADAPTERS = [Adapter(f"a{number}", Path(f"a{number}"), Path(f"a{number}-lora"), (number,)) for number in range(16)]


def test_bars_are_measured_under_the_names_that_the_table_has() -> None:
    names = {system: system for system in measure_bars.SYSTEMS}
    rows = [
        Row(
            system,
            2048,
            (Sample(0.1, 1.0),),
            adapters=count,
            details={"prefill_tokens_per_second": [900.0 + count, 910.0 + count]},
        )
        for system in names
        for count in (5, 16)
    ]
    samples: measure_bars.Samples = {}

    measure_bars._take_rows(rows, names, samples)
    for prefills in ("prefill", "llama_prefill", "llama_half_prefill"):
        assert samples[prefills] == [905.0, 915.0, 916.0, 926.0], "those of 16 adapters, too"
    elsewhere = ("step_16", "step_1", "step_base", "llama_step", "llama_half_step", "bytes_16", "bytes_1")
    samples |= {name: [1.0] for name in (*elsewhere, "ttft_stored", "ttft_2048", "ttft_6144", "ttft_512")}

    assert {result.bar for result in evaluate(samples, answers_right=True)} == {bar.name for bar in BARS}
    assert len(beside(samples)) == len(BESIDE)


def test_every_system_of_the_bars_exists_and_sixteen_adapters_are_asked_of_some() -> None:
    plan = measure_bars._fan_outs(measure_bars.Plan())

    assert set(measure_bars.SYSTEMS) <= set(SYSTEMS)
    assert {name for name in measure_bars.SYSTEMS if (name, 16) not in plan.skip} == {"ours", "llama", "llama-f16"}


def test_a_run_writes_what_it_has_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "OUTPUT", tmp_path)

    measure_bars.keep_bars("bars-unfinished", {"peft_5": [20.0], "ours_5": [1.0]})

    [row] = json.loads((tmp_path / "bars-unfinished.json").read_text())
    assert (row["value"], row["met"]) == (20.0, True)
    assert not row["holds"], "no answer was compared with PEFT's yet"
    assert "torch" in row["measured_on"]


RIGHT, WRONG = Correct(5, 5, "bfloat16", largest_gap=0.1), Correct(4, 5, "bfloat16", largest_gap=3.0)


@pytest.mark.parametrize(
    ("judged", "right"),
    [
        ({"ours": [RIGHT], "engine": [RIGHT], "llama": [WRONG]}, True),
        ({"ours": [RIGHT, WRONG], "engine": [RIGHT]}, False),
        ({"ours": [RIGHT], "engine": [WRONG]}, False),
        ({"ours": [RIGHT]}, False),
        ({"ours": [RIGHT], "engine": [Correct(0, 0, "float32")]}, False),
    ],
    ids=["a peer's are its own", "one row", "one system", "one not compared", "nothing compared"],
)
def test_answers_are_right_if_all_of_all_our_systems_were_compared_and_are(
    judged: dict[str, list[Correct]], right: bool
) -> None:
    by_row = {
        (system, f"question {number}", 2048, 5): correct
        for system, rows in judged.items()
        for number, correct in enumerate(rows)
    }

    assert measure_bars.answers_right(by_row, ["ours", "engine"]) is right


class JudgedAnswers:
    """In place of answers that were compared with PEFT's."""

    def __init__(self, correct: Correct) -> None:
        self.correct = correct

    async def judge(self, *_: object) -> dict[RowKey, Correct]:
        return {("ours", "5 adapters", 2048, 5): self.correct}


@pytest.mark.parametrize("kind", ["qkv", "all-linear"])
@pytest.mark.parametrize("correct", [RIGHT, WRONG], ids=["right", "wrong"])
async def test_a_run_with_a_wrong_answer_of_ours_writes_no_bar_that_holds_and_fails_its_check(
    kind: str, correct: Correct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ratios that meet every limit: those with "at least" are 20, those with "at most" 1 (an overhead of nothing).
    samples = {name: [1.0] for bar in BARS for name in (bar.above, bar.below)}
    samples |= {name: [20.0] for bar in BARS if bar.sense == "at least" for name in (bar.above,)}
    samples |= {name: [1.0] for _, *both in BESIDE for name in both if name not in samples}
    rows = [Row("ours", 2048, (Sample(0.1, 1.0),), what="5 adapters", adapters=5)]

    async def measure(*_: object) -> measure_bars.Measurement:
        return measure_bars.Measurement(samples, rows, {"ours_5": key_of(rows[0])}, ["ours"])

    def open_bench(console: Console, progress: Progress, **_: object) -> Bench:
        answers = JudgedAnswers(correct)
        return Bench(console, progress, tmp_path, "bfloat16", (), WordRenderer(), answers=answers)  # type: ignore[arg-type]

    monkeypatch.setattr(harness, "OUTPUT", tmp_path)
    monkeypatch.setattr(measure_bars, "OUTPUT", tmp_path)
    monkeypatch.setattr(measure_bars, "measure", measure)
    monkeypatch.setattr(measure_bars, "open_bench", open_bench)
    arguments = argparse.Namespace(kind=kind, device="cpu", dtype=None, quick=False, rounds=1, json=False)

    all_hold = await measure_bars.run(arguments, Console(file=StringIO()))

    assert all_hold is (correct is RIGHT)
    if kind == "qkv":
        written = json.loads((tmp_path / "bars.json").read_text())
        assert all(row["met"] for row in written)
        assert {row["holds"] for row in written} == {all_hold}
    suffix = "" if kind == "qkv" else f"-{kind}"
    [row] = json.loads((tmp_path / f"bars-rows{suffix}.json").read_text())["rows"]
    assert row["correct"]["equal"] == correct.equal
    table = capsys.readouterr().out
    assert f"{correct.equal} of 5" in table
    assert ("**no**" in table) is (kind == "qkv" and correct is WRONG)


class TimedSystem:
    """Answers in a set time, by the clock of its own process and by ours."""

    plain = False
    name = "timed"

    async def warm(self, prefix: TokenIds) -> Warmed:
        return Warmed(len(prefix), 1.0)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        # Ten milliseconds a token for the client, nine inside.
        total = 0.5 + 0.01 * (max_tokens - 1)
        return Answer((1,) * max_tokens, 0.5, total, {"step_seconds": 0.009})

    async def step_seconds(self, prefix: TokenIds, adapters: list[Adapter], max_tokens: int) -> float:
        return 0.1 * len(adapters)


def fake_bench(tmp_path: Path) -> Bench:
    console = Console(file=StringIO())
    return Bench(console, Progress(console=console), tmp_path, "float32", tuple(ADAPTERS), WordRenderer())  # type: ignore[arg-type]


async def test_a_base_step_is_the_mean_of_an_answer_by_the_clock_of_the_process_that_computes(tmp_path: Path) -> None:
    samples: measure_bars.Samples = {name: [] for bar in BARS for name in (bar.above, bar.below)}
    samples["llama_half_step"] = []
    systems = {name: TimedSystem() for name in ("engine", "llama", "llama-f16")}

    await measure_bars._steps(fake_bench(tmp_path), systems, measure_bars.Plan(rounds=2), samples)

    assert samples["step_base"] == pytest.approx([0.01, 0.01]), "the engine's tokens are timed in its process"
    assert samples["llama_step"] == samples["llama_half_step"] == [0.009, 0.009]
    assert samples["step_16"] == pytest.approx([1.6, 1.6])


async def test_first_tokens_are_compared_with_peft_at_every_length(tmp_path: Path) -> None:
    bench, samples = fake_bench(tmp_path), {name: [] for name in ("ttft_stored", "ttft_2048", "ttft_512", "ttft_6144")}

    keys = await measure_bars._first_tokens(bench, TimedSystem(), measure_bars.Plan(rounds=2), samples)

    assert keys.keys() == samples.keys()
    assert {key[2] for key in keys.values()} == {512, 2048, 6144}
    assert all(len(bench.answers.kept[key]) == 1 for key in keys.values())
    assert all(taken == [0.5, 0.5] for taken in samples.values())
