"""The simulation replays the router's own code, and what it shows holds whatever the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from routing_policies import POLICIES, Oracle
from routing_simulation import Outcome, Scenario, compare, main, pick_seconds, scenarios
from routing_traffic import Conversation, Request, Traffic, Turn, requests
from routing_worker import Speeds, Worker

SCENARIO = replace(scenarios(quick=True)[0], seconds=40.0)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {outcome.policy: outcome for outcome in compare(SCENARIO, list(POLICIES), seed=1)}


def test_all_policies_answer_the_same_requests(outcomes: dict[str, Outcome]) -> None:
    assert outcomes.keys() == POLICIES.keys()
    assert len({outcome.requests for outcome in outcomes.values()}) == 1
    assert all(outcome.requests > 200 for outcome in outcomes.values())


@pytest.mark.parametrize("simpler", ["round robin", "least in flight", "rendezvous"])
def test_predicting_loads_fewer_adapters_and_fetches_fewer_bytes(outcomes: dict[str, Outcome], simpler: str) -> None:
    ours, other = outcomes["predicted"], outcomes[simpler]
    assert ours.adapter_loads_per_1000 < other.adapter_loads_per_1000
    assert ours.fetched_bytes_per_request < other.fetched_bytes_per_request


@pytest.mark.parametrize("simpler", ["round robin", "least in flight", "rendezvous"])
def test_predicting_gives_first_tokens_sooner(outcomes: dict[str, Outcome], simpler: str) -> None:
    assert outcomes["predicted"].ttft_p50_seconds < outcomes[simpler].ttft_p50_seconds


def test_nobody_beats_the_one_who_knows_everything(outcomes: dict[str, Outcome]) -> None:
    assert min(outcomes.values(), key=lambda outcome: outcome.ttft_p50_seconds).policy == "oracle"


def test_fan_outs_stay_together_where_the_policy_knows_of_them(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["round robin"].workers_per_fan_out == SCENARIO.workers
    assert outcomes["predicted"].workers_per_fan_out < outcomes["least in flight"].workers_per_fan_out - 1


def test_a_run_depends_on_its_seed_alone() -> None:
    short = Scenario(3, Traffic(adapters=20), seconds=8.0)
    first, again = (compare(short, ["predicted"], seed=7) for _ in range(2))
    assert first == again
    assert compare(short, ["predicted"], seed=8) != first


def test_a_worker_loads_and_fetches_once_and_is_slower_in_company() -> None:
    worker, speeds = Worker(Speeds()), Speeds()
    turn = Turn(0.0, Conversation(1, 0, 512, 2000), ("a1", "a1"))
    one, two = requests(turn, 0, answer_tokens=16)
    oracle = Oracle([worker], None)  # type: ignore[arg-type]  # draws nothing
    assert oracle.choose(one, 0.0) == 0
    fetch = speeds.fetch_latency_seconds + 2000 * speeds.kv_bytes_per_token / speeds.fetch_bytes_per_second
    assert worker.accept(one, 0.0) == pytest.approx(speeds.adapter_load_seconds + fetch)
    assert worker.accept(two, 0.0) == pytest.approx(speeds.adapter_load_seconds + fetch), "it waits for the same fetch"
    assert (worker.loads, worker.fetched_bytes) == (1, 2000 * speeds.kv_bytes_per_token)
    alone, shared, apart = (
        speeds.step(batch, 2) for batch in ([one], [one, two], [one, replace_conversation(turn, number=2)])
    )
    assert alone < shared < apart


def replace_conversation(turn: Turn, number: int) -> Request:
    conversation = replace(turn.conversation, number=number)
    return requests(replace(turn, conversation=conversation), 1, answer_tokens=16)[0]


def test_a_pick_among_hundreds_of_endpoints_is_measured() -> None:
    assert 0 < pick_seconds(endpoints=300, repeats=5) < 0.1  # what it costs is for a quiet machine to say


def test_the_command_prints_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "routing.json"
    main(["--workers=2", "--adapters=5", "--seconds=6", "--policy=predicted", "--json", f"--output={output}"])
    document = json.loads(output.read_text())
    assert document == json.loads(capsys.readouterr().out)
    assert document["runs"][0]["outcomes"][0]["policy"] == "predicted"
    assert document["runs"][0]["scenario"]["traffic"]["adapters"] == 5
