from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from alora_serve.cli.app import app
from alora_serve.config import known_names

COMMANDS = [
    ["up"],
    ["chat"],
    ["http"],
    ["generate"],
    ["fanout"],
    ["prefill"],
    ["intrinsic"],
    ["adapters", "list"],
    ["adapters", "load"],
    ["adapters", "unload"],
    ["model"],
    ["doctor"],
    ["probe"],
    ["config"],
    ["demo"],
    ["plan"],
    ["tokenize"],
    ["score"],
    ["train"],
    ["eval"],
    ["compare"],
]


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_teaches_by_example_and_speaks_json(invoke, command: list[str]) -> None:
    told = invoke(*command, "--help")
    assert told.exit_code == 0
    assert f"alora-serve {' '.join(command)}" in told.stdout, "an example to start from"
    assert "--json" in told.stdout


def test_the_overview_names_every_command(invoke) -> None:
    told = invoke("--help").stdout
    assert all(command[0] in told for command in COMMANDS)


def test_help_imports_nothing_that_is_slow() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from alora_serve.cli.app import app\n"
        "CliRunner().invoke(app, ['up', '--help'])\n"
        "slow = {'torch', 'grpc', 'pydantic_settings', 'transformers', 'lmdb', 'redis', 'numpy'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_command_imports_torch_into_the_command_line() -> None:
    code = (
        "import sys; import alora_serve.cli.doctor, alora_serve.cli.demo.show, alora_serve.cli.local.up\n"
        "import alora_serve.cli.connection, alora_serve.cli.conversation\n"
        "import alora_serve.cli.plan.show, alora_serve.model.demo_model, alora_serve.model.shape\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_lists_every_setting(invoke) -> None:
    listed = json.loads(invoke("config", "--json").stdout)
    assert {row["variable"] for row in listed} == {f"ALORA_{name.upper()}" for name in known_names()}
    assert next(row for row in listed if row["variable"] == "ALORA_MAX_QUEUE") == {
        "group": "Engine",
        "flag": "--max-queue",
        "variable": "ALORA_MAX_QUEUE",
        "default": "100",
        "meaning": "Requests that may wait for a place before RESOURCE_EXHAUSTED.",
    }
    told = invoke("config").stdout
    assert "Engine: The batch." in told
    assert "ALORA_MAX_QUEUE" in told


def test_a_setting_that_does_not_exist_stops_up_and_doctor_with_its_name(invoke, monkeypatch) -> None:
    monkeypatch.setenv("ALORA_MAX_QUEU", "5")
    for command in ("up", "doctor"):
        told = invoke(command)
        assert told.exit_code == 1
        assert told.stderr == "error: unknown environment variable ALORA_MAX_QUEU='5'; did you mean ALORA_MAX_QUEUE?\n"


def test_up_says_which_flag_is_wrong(invoke) -> None:
    told = invoke("up", "--dtype", "float8", "--json")
    assert told.exit_code == 1
    assert "dtype='float8'" in json.loads(told.stdout)["error"]["message"]


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_without_the_model_extra_a_command_says_what_to_install(invoke, monkeypatch, tmp_path, command) -> None:
    from alora_serve.cli.local import machine

    monkeypatch.setattr(machine, "MODEL_PACKAGES", ("json", "torch_of_tomorrow"))
    flags = ["--data", str(tmp_path), "--output", str(tmp_path / "out")] if command == "train" else []
    told = invoke(command, *flags)
    assert told.exit_code == 1
    assert "not installed: torch_of_tomorrow" in told.output
    assert "pip install 'alora-serve[model]'" in told.output


def test_a_port_that_is_taken_stops_up_before_anything_is_loaded(invoke, tmp_path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = invoke("up", "--port", str(taken.getsockname()[1]), "--model", str(tmp_path), "--json")
    assert told.exit_code == 1
    (line,) = told.stdout.splitlines()
    assert "cannot listen on 127.0.0.1" in json.loads(line)["error"]["message"]


def test_a_service_that_does_not_start_ends_up_with_what_it_said(invoke, tmp_path) -> None:
    told = invoke("up", "--port", "0", "--model", str(tmp_path), "--store", f"lmdb://{tmp_path}/kv")
    assert told.exit_code == 1
    assert "did not start (exit status 2)" in told.stderr
    assert "the directory holds no config.json" in told.stdout
    assert "Traceback" not in told.output
