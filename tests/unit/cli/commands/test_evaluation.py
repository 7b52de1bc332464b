"""What `eval` does with refusals and thresholds; tests/integration/test_evaluation.py asks a real server."""

# ruff: noqa: N802  # gRPC methods carry the names of the proto
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from alora_serve.cli.app import app
from alora_serve.errors import OverloadedError
from alora_serve.v1 import alora_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceServicer, add_AloraServiceServicer_to_server
from fake_services import start_server


class ScriptedRouter(AloraServiceServicer):
    """Says "yes" of every conversation, once it has refused as often as it was told to."""

    def __init__(self) -> None:
        self.asked: list[alora_pb2.RunIntrinsicRequest] = []
        self.refusals = 0
        self.address = ""

    async def RunIntrinsic(self, request: alora_pb2.RunIntrinsicRequest, context: Any) -> Any:
        self.asked.append(request)
        if self.refusals:
            self.refusals -= 1
            raise OverloadedError("full", retry_after_seconds=0.01)
        return alora_pb2.RunIntrinsicResponse(raw_text='"yes"')


@pytest_asyncio.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    scripted = ScriptedRouter()
    server = await start_server(partial(add_AloraServiceServicer_to_server, scripted))
    scripted.address = server.address
    yield scripted
    await server.kill()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three rows, of which two are to be answered with "yes"."""
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}], "target": ("yes", "no")[i % 2]} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def evaluate(router: ScriptedRouter, data: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    command = ["eval", "-a", "guard", "--data", str(data), "--address", router.address, "--resamples", "40", "--json"]
    result = await asyncio.to_thread(CliRunner().invoke, app, [*command, *flags])
    printed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return result.exit_code, printed


async def test_rows_that_are_refused_for_load_are_asked_again(router: ScriptedRouter, data: Path) -> None:
    router.refusals = 4
    code, printed = await evaluate(router, data, "--together", "1")
    assert (code, printed["items"], len(router.asked)) == (0, 3, 7)
    assert printed["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)


async def test_what_the_instruction_names_is_passed_with_every_row(router: ScriptedRouter, data: Path) -> None:
    code, _ = await evaluate(router, data, "-p", "document=The sea = salt.", "--parameter", "tone=dry")
    assert code == 0
    assert [dict(each.parameters) for each in router.asked] == [{"document": "The sea = salt.", "tone": "dry"}] * 3


async def test_a_recipe_has_no_place_for_a_parameter(router: ScriptedRouter, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "guard.toml"
    recipe.write_text('labels = ["yes", "no"]')
    code, printed = await evaluate(router, data, "--recipe", str(recipe), "-p", "document=x")
    assert code == 1
    assert "--parameter" in printed["error"]["message"]
    assert router.asked == []


@pytest.mark.parametrize("bound", ["acuracy=0.9", "accuracy=nan", "accuracy"])
async def test_a_threshold_that_means_nothing_is_refused_before_any_row_is_asked(
    router: ScriptedRouter, data: Path, bound: str
) -> None:
    code, printed = await evaluate(router, data, "--threshold", bound)
    assert code == 1
    assert f"--threshold {bound}" in printed["error"]["message"]
    assert router.asked == []


async def test_a_threshold_for_a_figure_that_answers_have_not_is_missed_and_costs_no_answer(
    router: ScriptedRouter, data: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    bounds = ["--threshold", "accuracy=0.5", "--threshold", "ece=0.1"]
    code, printed = await evaluate(router, data, *bounds, "--save", str(saved))
    assert code == 1
    assert printed["missed"] == ["ece is not known of these answers, only accuracy, macro_f1"]
    assert len(printed["answers"]) == len(json.loads(saved.read_text())["answers"]) == 3
