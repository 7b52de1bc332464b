from __future__ import annotations

import argparse
import dataclasses
import json
import re
from io import StringIO
from itertools import groupby, pairwise
from pathlib import Path

import compare
import harness
import measure_bars
import pictures
import pytest
from adapters import NAMES, Adapter, invocation_text
from bars import BARS, BESIDE, beside, evaluate
from conversations import Exchange, conversation, exchanges
from correctness import RowKey, key_of
from harness import Correct, Row, Sample
from lineup import SYSTEMS, Bench
from peers.build_llama import LlamaBuild
from rich.console import Console
from rich.progress import Progress
from scenarios import arrivals, fan_out, turns
from systems.base import Answer, Warmed
from tables import rows_table

from alora_serve.types import ChatMessage, TokenIds

ADAPTERS = [Adapter(name, Path(name), Path(f"{name}-lora"), (number,)) for number, name in enumerate(NAMES[:5])]


class WordRenderer:
    """Counts words, and keeps a conversation readable: a token is a word's number."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def prefix(self, messages: list[ChatMessage] | tuple[ChatMessage, ...]) -> TokenIds:
        text = " ".join(f"<{message.role}> {message.content}" for message in messages)
        return tuple(self._number(word) for word in text.split())

    def base_prompt(self, messages: list[ChatMessage]) -> TokenIds:
        return (*self.prefix(messages), self._number("<answer>"))

    def _number(self, word: str) -> int:
        return self.words.setdefault(word, len(self.words))


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
    renderer = WordRenderer()
    renderer.of_length = lambda tokens, seed: (seed,) * tokens  # type: ignore[attr-defined]
    bench = Bench(console, Progress(console=console), tmp_path, "float32", tuple(ADAPTERS), renderer)  # type: ignore[arg-type]
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


def test_six_turns_alternate_between_base_model_and_adapters_and_only_ever_grow() -> None:
    renderer = WordRenderer()

    steps = turns.alternate(renderer, ADAPTERS, turns.Plan(tokens=300), seed=4)  # type: ignore[arg-type]

    assert [step.adapter for step in steps] == [None, ADAPTERS[0], None, ADAPTERS[1], None, ADAPTERS[2]]
    prompts = [step.prefix for step in steps]
    answer = renderer.words["<answer>"]
    for earlier, later in pairwise(prompts):
        kept = earlier[:-1] if earlier[-1] == answer else earlier
        assert later[: len(kept)] == kept
        assert len(later) > len(kept)
    assert len(prompts[0]) >= 200


def test_a_replay_shares_its_system_prompt_and_keeps_the_order_of_each_conversation() -> None:
    renderer, plan = WordRenderer(), turns.Plan(conversations=3, exchanges=4)

    steps = turns.replay(renderer, ADAPTERS, plan, seed=5)  # type: ignore[arg-type]

    assert len(steps) == 2 * 3 * 4
    system = renderer.prefix([turns.SYSTEM_PROMPT])
    assert all(step.prefix[: len(system)] == system for step in steps)
    assert [step.adapter is None for step in steps] == [True, False] * 12
    histories: list[TokenIds] = []
    for step in steps[1::2]:
        grown = [history for history in histories if step.prefix[: len(history)] == history]
        histories = [history for history in histories if history not in grown] + [step.prefix]
    assert len(histories) == 3


def test_exchanges_are_natural_text_and_differ_by_seed() -> None:
    first, second = exchanges(1, 80), exchanges(2, 80)

    assert first != second
    assert exchanges(1, 80) == first
    assert all(isinstance(found, Exchange) and len(found.user.content.split()) > 20 for found in first)
    with pytest.raises(ValueError, match="ask for fewer"):
        exchanges(1, 10_000)


@pytest.mark.parametrize("words", [40, 333, 2000])
def test_a_conversation_has_exactly_the_length_asked_for_and_is_talk(words: int) -> None:
    renderer = WordRenderer()

    messages = conversation(words, seed=1, count=renderer.prefix)

    assert len(renderer.prefix(messages)) == words
    assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    assert len(messages) > words // 200
    assert messages[-1].content.endswith("?")


def test_conversations_of_different_seeds_differ_from_their_first_words_on() -> None:
    renderer = WordRenderer()

    one, again, other = (renderer.prefix(conversation(300, seed=seed, count=renderer.prefix)) for seed in (1, 1, 2))

    assert one == again
    assert one[:4] != other[:4]


@pytest.mark.parametrize("words", [3, 100_000])
def test_a_length_that_no_conversation_has_is_refused(words: int) -> None:
    with pytest.raises(ValueError, match=f"{words} tokens"):
        conversation(words, seed=1, count=WordRenderer().prefix)


def test_every_adapter_has_an_invocation_of_its_own_that_special_tokens_enclose() -> None:
    texts = [invocation_text(name) for name in NAMES]

    assert len(set(texts)) == 16
    assert all(re.fullmatch(r"<\|im_start\|>\w+<\|im_end\|>", text) for text in texts)


@pytest.mark.parametrize("letter", list(compare.SCENARIOS))
def test_both_ways_of_peft_and_llama_server_take_part_in_every_scenario(letter: str) -> None:
    systems = compare.SCENARIOS[letter].systems

    assert {"ours", "peft-lora", "peft-alora"} <= set(systems)
    assert any(system.startswith("llama") for system in systems)


@pytest.mark.parametrize("letter", list(compare.SCENARIOS))
def test_a_scenario_names_systems_that_exist_and_is_smaller_when_quick(letter: str) -> None:
    scenario = compare.SCENARIOS[letter]

    assert set(scenario.systems) <= set(SYSTEMS)
    assert scenario.quick != scenario.plan
    assert type(scenario.quick) is type(scenario.plan)


def parse(*argv: str) -> argparse.Namespace:
    return compare.parse(argv)


def test_the_command_line_changes_lengths_adapters_and_rounds() -> None:
    plan = compare.planned(compare.SCENARIOS["a"], parse("--tokens", "2048", "--adapters", "5", "--rounds", "2"))

    assert plan == fan_out.Plan(tokens=(2048,), adapters=(5,), rounds=2)


def test_a_scenario_of_one_length_takes_the_first() -> None:
    plan = compare.planned(compare.SCENARIOS["c"], parse("--tokens", "512", "--rounds", "3"))

    assert (plan.tokens, plan.rounds) == (512, 3)
    assert plan.adapters == arrivals.Plan().adapters


def test_bars_are_measured_under_the_names_that_the_table_has() -> None:
    names = {system: system for system in measure_bars.SYSTEMS}
    details = {"prefill_tokens_per_second": [900.0]}
    rows = [
        Row(system, 2048, (Sample(0.1, 1.0),), adapters=count, details=details) for system in names for count in (5, 16)
    ]
    samples: measure_bars.Samples = {}

    measure_bars._take_rows(rows, names, samples)
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


def test_pictures_take_their_points_from_the_rows_of_a_file() -> None:
    rows = [
        dataclasses.asdict(Row(system, tokens, (Sample(0.1, 1.0),), adapters=adapters))
        | {"first_token_seconds_median": 0.1, "total_seconds_median": adapters * 1.0}
        for system in ("ours", "peer")
        for tokens in (510, 2040, 6100)
        for adapters in (1, 5)
    ]
    rows = json.loads(json.dumps(rows))

    assert pictures.contexts(rows)["ours"] == [(510, 0.1), (2040, 0.1), (6100, 0.1)]
    assert pictures.throughputs(
        [rows[0] | {"details": {"mean_in_flight": [1, 9, 2], "completed_per_second": [3, 4, 5]}}]
    ) == {"ours": [(2, 4)]}
    assert pictures.costs(rows) == {"ours": [(1, 1.0), (5, 5.0)], "peer": [(1, 1.0), (5, 5.0)]}


def test_a_peer_is_built_in_a_directory_of_its_version(tmp_path: Path) -> None:
    build = LlamaBuild(tmp_path)

    assert build.directory.parent == tmp_path
    assert build.server.is_relative_to(build.directory)
    assert build.facts["compiler"] == "unknown"
    assert "-DGGML_NATIVE=ON" in build.facts["flags"]  # type: ignore[operator]


def test_a_build_for_a_gpu_lies_beside_the_other(tmp_path: Path) -> None:
    plain, cuda = LlamaBuild(tmp_path), LlamaBuild(tmp_path, cuda=True)

    assert plain.source == cuda.source
    assert not {plain.server, plain.done} & {cuda.server, cuda.done}
    assert set(cuda.flags) - set(plain.flags) == {"-DGGML_CUDA=ON"}
