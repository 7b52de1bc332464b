from __future__ import annotations

import pytest
from bars import BARS, BESIDE, Bar, as_json, beside, evaluate, measured

PEER = Bar("against a peer", "theirs", "ours", 10, "at least", "peer")
LLAMA = Bar("against llama-server", "llama", "ours", 2.5, "at least", "llama")
SELF = Bar("16 against 1", "sixteen", "one", 2.0, "at most", "self")
OVERHEAD = Bar("overhead", "ours", "engine", 0.15, "at most", "self", minus=1.0)


def test_a_bar_is_a_ratio_of_medians() -> None:
    [result] = evaluate({"theirs": [20.0, 22.0, 99.0], "ours": [2.0, 1.0, 50.0]}, [PEER], answers_right=True)

    assert result.value == 11.0
    assert result.holds
    assert result.samples == {"theirs": [20.0, 22.0, 99.0], "ours": [2.0, 1.0, 50.0]}


@pytest.mark.parametrize(("theirs", "holds"), [(9.99, False), (10.0, True)])
def test_at_least_includes_the_limit(theirs: float, holds: bool) -> None:
    [result] = evaluate({"theirs": [theirs], "ours": [1.0]}, [PEER], answers_right=True)

    assert result.holds is holds


@pytest.mark.parametrize(("sixteen", "holds"), [(2.0, True), (2.01, False)])
def test_at_most_includes_the_limit(sixteen: float, holds: bool) -> None:
    [result] = evaluate({"sixteen": [sixteen], "one": [1.0]}, [SELF], answers_right=True)

    assert result.holds is holds


def test_an_overhead_is_what_is_beyond_the_denominator() -> None:
    [result] = evaluate({"ours": [1.1], "engine": [1.0]}, [OVERHEAD], answers_right=True)

    assert result.value == pytest.approx(0.1)
    assert result.holds


@pytest.mark.parametrize(("llama", "counts"), [(2.5, True), (2.4, False)])
def test_a_ratio_of_our_own_figures_counts_only_where_every_llama_bar_holds(llama: float, counts: bool) -> None:
    samples = {"llama": [llama], "ours": [1.0], "sixteen": [1.5], "one": [1.0], "theirs": [20.0]}

    results = {result.bar: result for result in evaluate(samples, [LLAMA, SELF, PEER], answers_right=True)}

    assert results[SELF.name].met
    assert results[SELF.name].counts is counts
    assert results[SELF.name].holds is counts
    assert results[PEER.name].holds
    assert results[LLAMA.name].holds is counts


def test_no_bar_holds_in_a_run_with_an_answer_that_is_not_pefts() -> None:
    samples = {"llama": [3.0], "ours": [1.0], "sixteen": [1.5], "one": [1.0], "theirs": [20.0]}

    results = evaluate(samples, [LLAMA, SELF, PEER], answers_right=False)

    assert all(result.met for result in results)
    assert not any(result.counts or result.holds for result in results)


@pytest.mark.parametrize(
    "samples", [{"theirs": [1.0]}, {"theirs": [1.0], "ours": []}, {"theirs": [1.0], "ours": [0.0]}]
)
def test_a_figure_that_was_not_measured_is_an_error_and_no_bar_met(samples: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="ours was not measured"):
        evaluate(samples, [PEER], answers_right=True)


def test_the_file_has_what_a_reader_of_it_looks_for() -> None:
    [row] = as_json(evaluate({"theirs": [20.0], "ours": [1.0]}, [PEER], answers_right=True), "a machine")

    assert {"bar", "value", "limit", "holds", "met", "counts", "samples"} <= row.keys()
    assert row["measured_on"] == "a machine"


def test_a_run_that_is_not_done_has_the_bars_whose_figures_are_known() -> None:
    samples = {"peft_5": [20.0], "ours_5": [1.0], "step_16": [2.0]}

    assert [bar.above for bar in measured(samples)] == ["peft_5"]
    assert measured({}) == []


def test_what_is_told_beside_has_no_limit_and_is_all_for_adapters_that_the_limits_are_not_meant_for() -> None:
    names = {name for bar in BARS for name in (bar.above, bar.below)}
    names |= {name for _, *both in BESIDE for name in both}
    samples = {name: [3.0] for name in names}

    assert [told.value for told in beside(samples)] == [1.0] * len(BESIDE)
    assert [told.what for told in beside(samples, bars_too=True)][:12] == [bar.name for bar in BARS]
    assert beside(samples | {"llama_half_5": [6.0]})[1].samples == {"llama_half_5": [6.0], "ours_5": [3.0]}


LIMITS = {
    ("peft_5", "ours_5"): (">=", 15, "peer"),
    ("twins_5", "ours_5"): (">=", 9, "peer"),
    ("llama_5", "ours_5"): (">=", 2.5, "llama"),
    ("llama_clients_5", "ours_5"): (">=", 15, "llama"),
    ("llama_16", "ours_16"): (">=", 5, "llama"),
    ("step_16", "step_1"): ("<=", 2.0, "self"),
    ("step_base", "llama_step"): ("<=", 2.5, "llama"),
    ("ttft_stored", "ttft_2048"): ("<=", 1.5, "self"),
    ("ttft_6144", "ttft_512"): ("<=", 1.6, "self"),
    ("prefill", "llama_prefill"): (">=", 1.5, "llama"),
    ("ours_5", "engine_5"): ("<=", 1.15, "self"),
    ("bytes_16", "bytes_1"): ("<=", 1.25, "self"),
}
"""What the ratio of two figures must be, and whom it compares with: the overhead of 15 % is a ratio of 1.15."""


def test_there_are_twelve_bars() -> None:
    assert {(bar.above, bar.below) for bar in BARS} == LIMITS.keys()
    assert len(BARS) == len({bar.name for bar in BARS}) == 12


@pytest.mark.parametrize("figures", LIMITS, ids="/".join)
def test_a_bar_is_met_up_to_its_limit_and_no_further(figures: tuple[str, str]) -> None:
    sense, limit, group = LIMITS[figures]
    [bar] = [bar for bar in BARS if (bar.above, bar.below) == figures]
    above, below = figures

    def met(ratio: float) -> bool:
        [result] = evaluate({above: [ratio], below: [1.0]}, [bar], answers_right=True)
        return result.met

    better, worse = (1.001, 0.999) if sense == ">=" else (0.999, 1.001)
    assert met(limit * better)
    assert not met(limit * worse)
    assert bar.group == group
