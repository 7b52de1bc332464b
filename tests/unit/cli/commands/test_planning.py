"""`alora-serve plan` from a directory to what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alora_serve.cli.app import app

CONFIG = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return lambda *options: CliRunner().invoke(app, ["plan", str(tmp_path), *options])


def test_a_config_alone_gives_memory_and_says_what_is_missing(plan: Any) -> None:
    told = plan("--conversations", "10", "--tokens", "8192")
    assert told.exit_code == 0
    assert "128 KiB" in told.stdout
    assert "1 GiB" in told.stdout, "a conversation"
    assert "12.5 GiB" in told.stdout, "the store"
    assert "no weights" in told.stdout
    assert "alora_engine_step_seconds_sum" in told.stdout


def test_rates_give_processes_and_price_for_people_and_machines(plan: Any) -> None:
    options = ("--prefill-rate", "1000", "--step-seconds", "0.1", "--core-price", "3", "--cores", "1")
    told = plan(*options)
    assert "price of 1,000 calls" in told.stdout
    lines = {
        what: line for line in told.stdout.splitlines() for what in ("prefill ", "step of", "fetch") if what in line
    }
    assert {what for what, line in lines.items() if "│ given" in line} == {"prefill ", "step of"}
    assert "default: two cores of an AMD EPYC" in lines["fetch"], "which nobody gave"
    made = json.loads(plan(*options, "--json").stdout)
    assert made["rates"]["step_sequences"] == 16
    assert made["rates"]["defaults"] == ["fetch_bytes_per_second"]
    assert made["recomputed"]["worker_seconds"] == pytest.approx(2048 / 1000 + 8 / 1000 + 16 * 0.1 / 16)
    assert made["recomputed"]["price_per_1000_calls"] == pytest.approx(made["recomputed"]["worker_seconds"] * 3 / 3.6)


def test_the_demo_model_is_planned_by_the_rates_of_another_machine_which_say_so(demo_model_directory: Path) -> None:
    told = CliRunner().invoke(app, ["plan", str(demo_model_directory), "--dtype", "float32", "--json"])
    made = json.loads(told.stdout)
    assert made["memory"]["kv_per_token"]["float32"] == 46_080
    assert made["parameters"] == 134_515_008
    assert made["rates"]["prefill_tokens_per_second"] == 360
    assert len(made["rates"]["defaults"]) == 3
    assert made["recomputed"]["price_per_1000_calls"] > 15 * made["reused"]["price_per_1000_calls"]


def test_the_operations_page_shows_the_demo_models_plan(
    demo_model_directory: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    told = CliRunner().invoke(app, ["plan", "demo", "--dtype", "float32"]).stdout
    shown = "\n".join(line.rstrip() for line in told.splitlines())
    assert shown in (pytestconfig.rootpath / "docs" / "operations.md").read_text()


def test_a_directory_without_a_model_is_one_clear_line(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert told.exit_code == 1
    assert "holds no config.json" in told.stderr
