"""The demo's parts; the whole of it, on real processes, is in tests/integration/test_cli.py."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import alora_serve
from alora_serve.cli.app import app
from alora_serve.cli.demo import show
from alora_serve.cli.demo.reference import _check, compare_with_peft
from alora_serve.cli.demo.result import Answer, Check, DemoResult
from alora_serve.cli.demo.run import temporary_store
from alora_serve.cli.demo.script import DemoScript
from alora_serve.cli.demo.view import ProgressView, RichView, View
from alora_serve.cli.local.events import Exited, Listening, Notice
from alora_serve.cli.pipeline.example import load_rag_guard
from alora_serve.cli.pipeline.result import Report, Spent, Step
from alora_serve.errors import ConfigError
from alora_serve.types import ChatMessage
from tiny_models import FAMILIES, peft_generate, save_adapter, save_model

READ = Step("document, turns", (), "", Spent(4.0, 2000, 0, 0, 2000, 0))
ASKED = Step("jailbreak?", ("jailbreak",), "no", Spent(0.1, 2005, 2000, 500, 5, 4), Spent(4.2, 2004, 0, 0, 2004, 4))
RESULT = DemoResult(
    reply="Trevithick.",
    warnings=("the model is not certain of this",),
    report=Report((READ, ASKED)),
    checks=(Check("jailbreak", True, "tokens [3]"),),
    dtype="float32",
    threads=2,
    versions={"torch": "2"},
)


@pytest.fixture
def screen() -> tuple[RichView, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=140)
    return RichView(console, console.status("")), out


def test_the_object_for_machines_has_what_was_promised() -> None:
    assert {
        "reply": "Trevithick.",
        "warnings": ("the model is not certain of this",),
        "adapter_seconds": 0.1,
        "adapter_computed_tokens": 5,
        "lora_recompute_seconds": 4.2,
        "lora_recompute_computed_tokens": 2004,
        "equal_to_peft": True,
        "dtype": "float32",
        "threads": 2,
        "versions": {"torch": "2"},
        "steps": (READ, ASKED),
    }.items() <= RESULT.to_json().items()


def test_one_different_answer_or_none_compared_is_not_equal() -> None:
    different = replace(RESULT, checks=(*RESULT.checks, Check("again", False, "tokens [4]")))
    assert not different.equal_to_peft
    assert not replace(RESULT, checks=()).equal_to_peft


def test_people_see_the_conversation_the_verdicts_and_the_table(screen: tuple[RichView, io.StringIO]) -> None:
    view, out = screen
    view.doing("starting")
    view.listening({"router": Listening("router", 7, "127.0.0.1:5", "127.0.0.1:6")}, "from Wikipedia")
    view.turn(ChatMessage("user", "x" * 5000 + " who?"))
    view.step(READ)
    view.step(ASKED)
    view.reply(RESULT.reply, RESULT.warnings)
    view.process(Notice("the budget is lowered"))
    view.process(Exited("worker-1", 1, -9, False, 0.1))
    view.process(Exited("worker-1", 1, 3, False, 0.1))
    view.process(Exited("worker-1", 1, 0, True, None))
    view.result(replace(RESULT, checks=(*RESULT.checks, Check("other", False, "tokens [4]"))), 97.6)
    told = out.getvalue()
    for part in (
        "(starting)",
        "router    pid 7       gRPC 127.0.0.1:5",
        "from Wikipedia",
        "[... 4,405 more characters ...]",
        "document, turns 4.00 s, 2,000 of 2,000 tokens computed",
        "jailbreak? no  0.10 s, 5 of 2,005 tokens computed",
        "reply: Trevithick.",
        "beware: the model is not certain of this",
        "the budget is lowered",
        "worker-1 died: SIGKILL",
        "worker-1 died: exit status 3",
        "42.0 times sooner",
        "equal  jailbreak",
        "DIFFERENT  other  PEFT: tokens [4]",
    ):
        assert part in told, part
    assert "exit status 0" not in told
    assert told.splitlines()[-1] == "all of it took 98 s"


def test_machines_are_told_of_progress_beside_the_object() -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out, width=140))
    view.doing("starting")
    view.doing("")
    view.turn(ChatMessage("user", "who?"))
    view.process(Notice("the budget is lowered"))
    view.process(Exited("worker-1", 1, -9, False, 0.1))
    assert out.getvalue().splitlines() == ["starting", "the budget is lowered", "worker-1 died: SIGKILL"]


def test_the_script_is_the_examples_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    examples = Path(alora_serve.__file__).resolve().parents[2] / "examples"
    monkeypatch.setattr("alora_serve.__file__", str(tmp_path / "shared" / "alora_serve" / "__init__.py"))
    (tmp_path / "examples" / "rag_guard").mkdir(parents=True)
    shutil.copy(examples / "rag_guard.py", tmp_path / "examples")
    content = {"title": "Steam", "source": "Wikipedia", "licence": "CC BY-SA 4.0"}
    content["messages"] = [{"role": "user", "content": "When?"}]
    (tmp_path / "examples" / "rag_guard" / "harvard.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"the demo needs jailbreak, query_rewrite, .*, uncertainty-lora in .*: run"):
        DemoScript.load()
    for name in ("jailbreak", "query_rewrite", "answerability", "hallucination", "uncertainty"):
        for directory in (name, f"{name}-lora"):
            (tmp_path / "examples" / "intrinsics" / directory).mkdir(parents=True)
    script = DemoScript.load()
    assert script.messages == (ChatMessage("user", "When?"),)
    assert script.adapter_root == tmp_path / "examples" / "intrinsics"
    assert script.source == "document: Steam, Wikipedia, CC BY-SA 4.0"


def test_the_store_of_a_demo_is_gone_afterwards_and_so_are_those_of_killed_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("alora_serve.cli.demo.run.lmdb_root", lambda url: tmp_path / "shm" / "store")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    user = os.getuid()
    killed = tmp_path / "shm" / f"alora-serve-{user}-demo-{gone.pid}-abc"
    running = tmp_path / "shm" / f"alora-serve-{user}-demo-{os.getppid()}-abc"
    foreign = tmp_path / "shm" / f"alora-serve-{user}-demo-notes"
    for directory in (killed, running, foreign):
        directory.mkdir(parents=True)
    with temporary_store() as url:
        own = Path(url.removeprefix("lmdb://"))
        assert own.is_dir()
        assert own.parent == tmp_path / "shm"
        (own / "data.mdb").write_text("")
    assert not own.exists()
    assert not killed.exists()
    assert running.exists()
    assert foreign.exists()


async def test_answers_are_compared_with_peft_in_a_process_of_its_own(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_model(tmp_path / "model", FAMILIES["llama"]())
    targets = ["q_proj", "v_proj"]
    save_adapter(model, tmp_path / "one", seed=1, alora_invocation_tokens=[5, 6], target_modules=targets)
    prompt = (9, 8, 7, 5, 6)
    adapted, base = (peft_generate(model, one, prompt, 4).tokens for one in (tmp_path / "one", None))
    answers = [
        Answer("one", "right", adapted, prompt),
        Answer("one", "wrong", base, prompt),
        Answer("", "base", base, prompt),
    ]
    checks, versions = await compare_with_peft(answers, model=model, adapter_root=tmp_path, dtype="float32", threads=1)
    assert [check.equal for check in checks] == [True, False, True]
    assert checks[1].name == "one, 5 tokens of prompt: 'wrong'"
    assert checks[1].detail == f"tokens {list(adapted)}"
    assert set(versions) == {"torch", "transformers", "peft"}
    assert _check({"name": "b", "equal": True, "largest_gap": 0.0625}) == Check(
        "b", True, "largest gap 0.062 in logits"
    )
    with pytest.raises(ConfigError, match="could not be computed"):
        await compare_with_peft(answers, model=tmp_path / "no", adapter_root=tmp_path, dtype="float32", threads=1)


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> dict[str, DemoResult]:
    """The demo, with its run replaced by a result."""
    results = {"now": RESULT}

    async def run_demo(script: object, options: object, view: View) -> DemoResult:
        view.doing("computing")
        return results["now"]

    script = DemoScript((), load_rag_guard().rag_guard, (), Path())
    monkeypatch.setattr(DemoScript, "load", classmethod(lambda cls: script))
    monkeypatch.setattr(show, "run_demo", run_demo)
    monkeypatch.setattr(show, "ensure_demo_model", lambda console: None)
    return results


def test_the_command_fails_when_a_token_differs(rehearsed: dict[str, DemoResult]) -> None:
    told = CliRunner().invoke(app, ["demo"])
    assert told.exit_code == 0
    assert "42.0 times sooner" in told.stdout
    assert re.fullmatch(r"all of it took \d+ s", told.stdout.splitlines()[-1])
    rehearsed["now"] = replace(RESULT, checks=())
    asked = CliRunner().invoke(app, ["demo", "--json"])
    assert asked.exit_code == 1
    object_for_machines = json.loads(asked.stdout)
    assert object_for_machines["equal_to_peft"] is False
    assert object_for_machines["seconds"] >= 0
    assert asked.stderr == "computing\n"
