from __future__ import annotations

import argparse
import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import compare
import pictures
import pytest
from adapters import NAMES, Adapter, invocation_text
from harness import Row, Sample
from lineup import SYSTEMS
from peers.build_llama import LlamaBuild
from scenarios import arrivals, fan_out, turns

from alora_serve.types import TokenIds
from word_renderer import WordRenderer

ADAPTERS = [Adapter(name, Path(name), Path(f"{name}-lora"), (number,)) for number, name in enumerate(NAMES[:5])]


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
