"""The command line on the real thing: `up` with the demo model as processes, every command against it, and `demo`."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from alora_serve.cli.app import app
from alora_serve.cli.demo.run import run_demo
from alora_serve.cli.demo.script import DemoScript
from alora_serve.cli.demo.view import SilentView
from alora_serve.cli.local import DeploymentOptions
from alora_serve.cli.pipeline.meter import Meter
from alora_serve.cli.verdicts import Verdict
from alora_serve.types import ChatMessage

ADAPTER, LORA_TWIN = "jailbreak", "jailbreak-lora"
FACT = "Water boils at 100 degrees Celsius at sea level, and at lower temperatures on mountains. " * 12
CONVERSATION = [{"role": "user", "content": f"{FACT}\n\nAt how many degrees does water boil at sea level?"}]
WAIT_SECONDS = 120


class Up:
    """A running ``alora-serve up --json`` and the events it has printed."""

    def __init__(self, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ALORA_")}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alora_serve.cli.app", "up", "--json", "--port", "0", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seen: list[dict[str, Any]] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, event: str, process: str = "") -> dict[str, Any]:
        """The next event of that kind."""
        while True:
            line = self._lines.get(timeout=WAIT_SECONDS)
            assert line, f"it ended before {event}: {self.seen[-20:]}"
            happened = json.loads(line)
            self.seen.append(happened)
            if happened["event"] == event and process in ("", happened.get("process")):
                return happened

    def stop(self) -> int:
        """SIGTERM, then read to the end; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        while not self._ended and (line := self._lines.get(timeout=WAIT_SECONDS)):
            self.seen.append(json.loads(line))
        self._ended = True
        return self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")


@pytest.fixture(scope="module")
def adapters(demo_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Activated LoRA and a plain one with random weights, which change every answer."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = AutoTokenizer.from_pretrained(demo_model_directory)
    invocation = tokenizer.encode("<|im_start|>jailbreak<|im_end|>", add_special_tokens=False)
    for name, extra in ((ADAPTER, {"alora_invocation_tokens": invocation}), (LORA_TWIN, {})):
        torch.manual_seed(len(name))
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            **extra,
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo_model_directory), config)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def up(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    store = tmp_path_factory.mktemp("store")
    running = Up("--dtype", "float32", "--threads", "1", "--adapters", str(adapters), "--store", f"lmdb://{store}")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ready(up: Up) -> dict[str, Any]:
    """The event that says where everything is."""
    return up.wait_for("ready")


@pytest.fixture
def run(ready: dict[str, Any]) -> Callable[..., Result]:
    """Runs a command against the deployment."""

    def invoke(*arguments: str, stdin: str | None = None, columns: int = 200) -> Result:
        environment = {"ALORA_ADDRESS": ready["router_address"], "COLUMNS": str(columns)}
        return CliRunner().invoke(app, list(arguments), input=stdin, env=environment)

    return invoke


@pytest.fixture
def ask(run: Callable[..., Result]) -> Callable[..., Any]:
    """Runs a command that must succeed, and returns the JSON it printed."""

    def invoke(*arguments: str, stdin: str | None = None) -> Any:
        result = run(*arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


def test_every_service_is_a_process_of_its_own(ready: dict[str, Any]) -> None:
    assert set(ready["processes"]) == {"prefill", "worker-1", "router"}
    commands = {name: psutil.Process(one["pid"]).cmdline() for name, one in ready["processes"].items()}
    modules = {name: command[command.index("-m") + 1] for name, command in commands.items()}
    assert modules == {"prefill": "base_prefill", "worker-1": "adapter_decode", "router": "adapter_router"}


def test_generate_streams_text_for_people_and_prints_an_object_for_machines(run, ask) -> None:
    told = run("generate", "--message", "What is the capital of France?", "--max-tokens", "12")
    assert told.exit_code == 0
    assert "Paris" in told.stdout
    assert "prompt tokens" in told.stderr
    answer = ask("generate", "--max-tokens", "12", stdin="What is the capital of France?")
    assert answer["text"] == told.stdout.removesuffix("\n")
    assert answer["usage"]["generated_tokens"] == len(answer["token_ids"])


def test_a_saved_handle_goes_on_with_an_adapter_and_with_a_further_turn(run, ask, tmp_path: Path) -> None:
    (tmp_path / "conversation.json").write_text(json.dumps(CONVERSATION))
    file, handle, turn = (str(tmp_path / name) for name in ("conversation.json", "handle", "turn"))
    told = run("prefill", "--file", file, "--save", handle)
    assert told.exit_code == 0, told.output
    assert f"handle saved to {handle}" in told.stdout.replace("\n", "")
    verdict = ask("generate", "--handle", handle, "--adapter", ADAPTER, "--max-tokens", "4")
    usage = verdict["usage"]
    assert usage["cached_tokens"] == usage["invocation_start"]
    assert verdict["handle"] is None
    answer = ask("generate", "--handle", handle, "--max-tokens", "8", "--save", turn)
    further = ask("generate", "--handle", turn, "-m", "And on a mountain?", "--max-tokens", "4")
    assert further["usage"]["cached_tokens"] >= answer["usage"]["prompt_tokens"]
    refused = run("generate", "--handle", handle, "-a", ADAPTER, "--max-tokens", "1", "--save", turn)
    assert refused.exit_code == 1
    assert "an adapter's answer has no handle" in refused.stderr


def test_fanout_answers_for_each_and_fails_if_one_failed(run, ask) -> None:
    answers = ask("fanout", "-a", ADAPTER, "-a", LORA_TWIN, "--base", "-m", "Hello.", "--max-tokens", "3")
    assert [answer["adapter"] for answer in answers] == [ADAPTER, LORA_TWIN, ""]
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 3
    told = run("fanout", "-a", ADAPTER, "-a", "jailbrake", "-m", "Hello.", "--max-tokens", "3")
    assert told.exit_code == 1
    assert "no adapter named 'jailbrake'" in told.stdout
    failed = run("fanout", "-a", "jailbrake", "-m", "Hello.", "--json")
    assert json.loads(failed.stdout)[0]["error"]["reason"] == "ADAPTER_NOT_FOUND"


def test_an_answer_takes_the_form_that_is_asked_for(run, ask, tmp_path: Path) -> None:
    message = ("generate", "-m", "Is water wet?")
    told = run(*message, "--choice", "yes", "--choice", "no", "--top-logprobs", "2")
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[0] in ("yes", "no")
    assert "likeliest" in told.stdout
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"], ')
    assert "is not JSON" in run(*message, "--json-schema", str(schema)).stderr
    schema.write_text(schema.read_text() + '"additionalProperties": false}')
    for given in (str(schema), schema.read_text()):
        answer = ask(*message, "--json-schema", given, "--top-logprobs", "1")
        assert isinstance(json.loads(answer["text"])["wet"], bool)
        assert "".join(answer["tokens"]) == answer["text"]
        assert [len(likely) for likely in answer["top_logprobs"]] == [1] * len(answer["token_ids"])
    assert re.fullmatch("[a-c]{3}", ask(*message, "--regex", "[a-c]{3}")["text"])
    assert ask(*message, "--grammar", 'start: "a" "b"')["text"] == "ab"
    both = ask("fanout", "-a", ADAPTER, "--base", "-m", "Hello.", "--choice", "x", "--choice", "y")
    assert {answer["text"] for answer in both} <= {"x", "y"}
    refused = run(*message, "--regex", "a", "--choice", "b")
    assert "give one of --json-schema, --regex, --choice and --grammar" in refused.stderr
    assert "cannot be read" in run(*message, "--grammar", str(tmp_path / "none")).stderr
    assert "sampling.structured_output.regex" in run(*message, "--regex", "(?=a)").stderr


def test_several_samples_are_printed_each(run, ask) -> None:
    drawn = (
        "generate",
        "-m",
        "Name a boat.",
        "--samples",
        "3",
        "--temperature",
        "1",
        "--seed",
        "4",
        "--max-tokens",
        "6",
    )
    answers = ask(*drawn)
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 3
    told = run(*drawn)
    assert [line[:3] for line in told.stdout.splitlines() if line.startswith("[")] == ["[0]", "[1]", "[2]"]
    assert "a handle for each sample" in run(*drawn, "--save", "somewhere").stderr


def test_adapters_are_listed_loaded_and_unloaded(run, ask) -> None:
    alora, lora = ask("adapters", "list")
    assert (alora["name"], lora["name"]) == (ADAPTER, LORA_TWIN)
    assert (alora["invocation_text"], lora["invocation_text"]) == ("<|im_start|>jailbreak<|im_end|>", "")
    assert ask("adapters", "load", ADAPTER)["resident"]
    assert f"{ADAPTER} is in memory: alora, rank 8" in run("adapters", "load", ADAPTER).stdout
    assert ask("adapters", "unload", ADAPTER) == {"name": ADAPTER, "was_resident": True}
    assert run("adapters", "unload", ADAPTER).stdout == f"{ADAPTER}: was not loaded\n"
    assert run("adapters", "load", ADAPTER).exit_code == 0
    assert run("adapters", "unload", ADAPTER).stdout == f"{ADAPTER}: unloaded; its next use reads it again\n"
    listed = run("adapters", "list", columns=40)
    assert listed.exit_code == 0
    assert re.search(
        f"^{LORA_TWIN}  lora, rank 8,( in memory,)? digest {lora['digest'][:12]}$", listed.stdout, re.MULTILINE
    )
    assert "    invoked by '<|im_start|>jailbreak<|im_end|>'\n    adapts q_proj, v_proj\n" in listed.stdout


def test_tokens_are_shown_as_stock_transformers_makes_them(run, ask, demo_model_directory: Path) -> None:
    told = ask("tokenize", stdin=json.dumps(CONVERSATION))
    template = AutoTokenizer.from_pretrained(demo_model_directory).apply_chat_template
    expected = template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert told["prefix_tokens"] + told["generation_prompt_tokens"] == expected
    assert told["prefix_tokens"] == template(CONVERSATION, add_generation_prompt=False, return_dict=False)
    shown = run("tokenize", stdin=json.dumps(CONVERSATION))
    assert f"conversation, {len(told['prefix_tokens'])} tokens: 1 " in shown.stdout
    assert " ".join(map(str, told["generation_prompt_tokens"])) in shown.stdout


def test_answers_are_scored_and_the_generated_one_is_likeliest(run, ask) -> None:
    question = ("-m", "What is the capital of France? One word.")
    said = ask("generate", *question, "--max-tokens", "3")["text"]
    told = ask("score", *question, "-c", said, "-c", "Rome in Italy")
    best, other = told["scores"]
    assert (best["text"], best["total"]) == (said, pytest.approx(sum(best["logprobs"])))
    assert best["total"] > other["total"]
    shown = run("score", *question, "-a", ADAPTER, "-c", "yes", "-c", "no")
    assert shown.exit_code == 0, shown.output
    assert "share" in shown.stdout
    assert "continuations: 0 continuations are not 1 to 256" in run("score", *question).stderr


def test_the_model_is_described(run, ask) -> None:
    assert ask("model")["dtype"] == "float32"
    assert "LlamaForCausalLM" in run("model").stdout


def test_errors_are_one_clear_line_with_what_to_mend_and_never_a_traceback(run) -> None:
    told = run("generate", "-m", "Hello.", "--temperature", "-1", "--top-p", "0")
    assert told.exit_code == 1
    assert "Traceback" not in told.output
    assert "sampling.temperature: -1 is not in [0, 100]" in told.stderr
    assert "sampling.top_p: 0 is not in (0, 1]" in told.stderr
    asked = run("generate", "-m", "Hello.", "-a", "jailbrake", "--json")
    assert asked.exit_code == 1
    error = json.loads(asked.stdout)["error"]
    assert (error["status"], error["reason"]) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    nobody = CliRunner().invoke(app, ["model", "--address", "127.0.0.1:1", "--timeout", "1"])
    assert nobody.exit_code == 1
    assert nobody.stderr.startswith("error: ")


def test_doctor_finds_nothing_wrong_with_it(ready, adapters: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("ALORA_STORE_URL", raising=False)
    arguments = ["--address", ready["router_address"], "--adapters", str(adapters), "--store", f"lmdb://{tmp_path}/kv"]
    told = CliRunner().invoke(app, ["doctor", *arguments, "--dtype", "float32"])
    assert told.exit_code == 0, told.output
    assert "adapter jailbreak-lora" in told.stdout
    assert "serves SmolLM2-135M-Instruct in float32 with 2 adapters" in " ".join(told.stdout.split())
    assert "nothing is wrong" in told.stdout


def test_a_killed_worker_comes_back_on_its_address_and_reads_the_store(up: Up, ready: dict[str, Any], ask) -> None:
    arguments = ("generate", "--adapter", ADAPTER, "--max-tokens", "4")
    conversation = json.dumps(CONVERSATION)
    before = ask(*arguments, stdin=conversation)
    worker = ready["processes"]["worker-1"]
    os.kill(worker["pid"], signal.SIGKILL)
    died = up.wait_for("exited", "worker-1")
    assert (died["status"], died["expected"]) == (-signal.SIGKILL, False)
    back = up.wait_for("listening", "worker-1")
    assert back["address"] == worker["address"]
    after = ask(*arguments, "--timeout", str(WAIT_SECONDS), stdin=conversation)
    assert after["token_ids"] == before["token_ids"]
    assert after["usage"]["fetched_bytes"] > 0
    assert after["usage"]["computed_tokens"] <= before["usage"]["prompt_tokens"] - before["usage"]["invocation_start"]


def test_sigterm_drains_router_then_workers_then_prefill_and_leaves_nobody(up: Up, ready: dict[str, Any]) -> None:
    children = psutil.Process(up.process.pid).children(recursive=True)
    assert len(children) >= 3
    assert up.stop() == 0
    ends = [event for event in up.seen if event["event"] == "exited" and event["expected"]]
    assert [end["process"] for end in ends] == ["router", "worker-1", "prefill"]
    assert [end["status"] for end in ends] == [0, 0, 0]
    assert not any(child.is_running() for child in children)


@pytest.mark.timeout(600)  # five processes load torch, on a machine that tests may share
async def test_the_demo_asks_a_guarded_question_and_gives_the_tokens_of_peft() -> None:
    """Its own adapters and pipeline, on a document that is short, for time."""
    document = ChatMessage("user", f"You have access to the following documents:\n\n[Document 1]\n{FACT[:180]}")
    question = ChatMessage("user", "At how many degrees does water boil at sea level?")
    options = DeploymentOptions(dtype="float32", threads=1)
    script = replace(DemoScript.load(), messages=(document, question), pipeline=every_step)
    result = (await run_demo(script, options, SilentView())).to_json()
    assert result["equal_to_peft"] is True
    assert len(result["checks"]) == len(script.intrinsics)
    assert result["dtype"] == "float32"
    read, *asked = result["steps"]
    checks = [step for step in asked if step.intrinsics]
    assert sorted(name for step in checks for name in step.intrinsics) == sorted(script.intrinsics)
    assert read.spent.cached_tokens == 0
    for step in checks:
        assert step.spent.cached_tokens >= len(step.intrinsics) * read.spent.prompt_tokens
        assert step.recomputed.cached_tokens == 0
    assert checks[-1].spent.fetched_tokens >= read.spent.prompt_tokens, "its processes were fresh"
    assert result["adapter_computed_tokens"] < result["lora_recompute_computed_tokens"] / 4
    assert {"alora-serve", "torch", "transformers", "peft"} <= set(result["versions"])


def every_step(meter: Meter, messages: Sequence[ChatMessage]) -> Any:
    """The demo's pipeline, whatever its checks find: small models err on short documents."""

    class Passing:
        read, answer = meter.read, meter.answer

        def ask(self, *arguments: Any) -> Mapping[str, Verdict]:
            meter.ask(*arguments)
            return {}

    return DemoScript.load().pipeline(cast(Meter, Passing()), messages)
