from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from alora_serve.adapters.catalog import refused_info
from alora_serve.cli.chat.commands import COMMANDS
from alora_serve.cli.chat.view import JsonView, PeopleView, View
from alora_serve.cli.verdicts import Cost, Verdict
from alora_serve.client import GenerationResult
from alora_serve.errors import AdapterNotFoundError
from alora_serve.types import AdapterDigest, AdapterInfo, FinishReason, ModelInfo, Timings, Usage

MODEL = ModelInfo("tiny", b"", b"", "LlamaForCausalLM", "float32", 2048, 320, 16, 512)
GUARD = AdapterInfo("guard", AdapterDigest("ab"), "alora", 8, ("q_proj",), (1,), "<|guard|>", 64, True)
USAGE = Usage(prompt_tokens=1064, cached_tokens=51, fetched_tokens=9, computed_tokens=1013, generated_tokens=8)
TIMINGS = Timings(first_token_seconds=0.25, total_seconds=0.5)
COST = Cost("guard", USAGE, TIMINGS)
ERROR = AdapterNotFoundError("no adapter named 'gaurd'")


def result(text: str, reason: FinishReason = FinishReason.STOP) -> GenerationResult:
    return GenerationResult(text, (1,), reason, USAGE, TIMINGS, None, "", (), AdapterDigest(""), 0)


def show_everything(view: View) -> None:
    """A chat in which everything happens."""
    view.ready(MODEL, [GUARD])
    view.waiting()
    view.text("", "Par")
    view.text("", "is.")
    view.answered("", result("Paris."))
    view.text("guard", "yes")
    view.answered("guard", result("yes", FinishReason.LENGTH))
    view.answered("guard", result(""))
    view.text("", "Half")
    view.broken_off("", "Half")
    view.verdict(Verdict("guard", {"likelihood": 0.5}, "yes", COST))
    view.verdict(Verdict("certain", "", "", COST))
    view.verdict(Verdict("gaurd", error=ERROR))
    view.adapters([GUARD, refused_info("dora", "DoRA is not served")])
    view.adapters([])
    view.usage([Cost("", USAGE, TIMINGS), COST])
    view.commands()
    view.note("stopped")
    view.refused("there is nothing to save yet")
    view.failed(ERROR)


def test_in_a_pipe_standard_output_has_answers_and_verdicts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    show_everything(PeopleView(Console(file=out, width=80), Console(file=err, width=80)))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[:9] == [
        "Paris.",
        "guard? yes",
        "guard?",
        "Half",
        'guard: {"likelihood": 0.5}',
        "certain: (nothing)",
        "gaurd: no adapter named 'gaurd'",
        "guard  alora, rank 8",
        "dora  DoRA is not served",
    ]
    assert [line.split() for line in lines if line.startswith((" base", "base"))] == [
        ["base", "1,064", "51", "9", "1,013", "8", "0.250", "s", "0.500", "s"]
    ]
    assert all(any(line.startswith(f"/{command.name}") for line in lines) for command in COMMANDS)
    assert max(map(len, lines)) <= 80
    told = err.getvalue()
    for part in (
        "(tiny, float32, up to 2,048 tokens; adapters: guard)",
        "(cut off after 8 tokens: --max-tokens allows more)",
        "(there are no adapters)",
        "(stopped)",
        "there is nothing to save yet",
    ):
        assert part in told
    assert "error: no adapter named 'gaurd'" in capsys.readouterr().err


def test_machines_get_an_object_for_everything_that_happens(capsys: pytest.CaptureFixture[str]) -> None:
    show_everything(JsonView())
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    happened = [event["event"] for event in told]
    assert happened[:5] == ["ready", "waiting", "text", "text", "answer"]
    assert happened[5:10] == ["text", "answer", "answer", "text", "broken_off"]
    assert happened[10:13] == ["verdict"] * 3
    assert happened[13:] == ["adapters", "adapters", "usage", "help", "note", "refused", "error"]
    assert told[0]["adapters"][0]["name"] == "guard"
    assert told[2] == {"event": "text", "adapter": "", "text": "Par"}
    assert (told[4]["text"], told[4]["finish_reason"], told[4]["usage"]["computed_tokens"]) == ("Paris.", "stop", 1013)
    assert (told[10]["intrinsic"], told[10]["value"], told[10]["text"]) == ("guard", {"likelihood": 0.5}, "yes")
    assert told[12]["error"]["reason"] == "ADAPTER_NOT_FOUND"
    assert told[15]["costs"][1]["adapter"] == "guard"
    assert {"usage": "/keep", "meaning": COMMANDS[1].meaning} in told[16]["commands"]
