from __future__ import annotations

import asyncio
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from alora_serve.cli.local import DeploymentOptions, deployment, up
from alora_serve.cli.local.deployment import LocalSettings
from alora_serve.cli.local.events import Exited, Listening, LogLine, Notice, Spawned, StartError
from alora_serve.cli.local.process import ProcessSpec
from alora_serve.errors import ConfigError
from alora_serve.kv.lmdb import default_location

EVENTS = [
    Notice("the budget is lowered"),
    Spawned("prefill", 11),
    LogLine("prefill", "[bold]not markup[/]"),
    Listening("prefill", 11, "127.0.0.1:1", "127.0.0.1:2"),
    Exited("prefill", 11, -9, False, 0.1),
    Spawned("prefill", 12),
    Exited("prefill", 12, 3, False, None),
    Exited("prefill", 12, 0, True, None),
]


class FakeDeployment:
    """What a view asks a deployment for."""

    router_address = "127.0.0.1:50051"
    processes: ClassVar = {"router": Listening("router", 13, "127.0.0.1:50051", "127.0.0.1:9")}
    settings = LocalSettings(model="demo", store_url="lmdb:")


@pytest.fixture
def shown() -> tuple[up.TextView, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=400)
    return up.TextView(console, 1, console.status("")), out


def test_people_see_log_lines_behind_names_deaths_and_notices(shown: tuple[up.TextView, io.StringIO]) -> None:
    view, out = shown
    for event in EVENTS:
        view.event(event)
    assert out.getvalue().splitlines() == [
        "up       | the budget is lowered",
        "prefill  | [bold]not markup[/]",
        "prefill  | died: killed by SIGKILL, starting again in 0.1 s",
        "prefill  | died: exit status 3",
    ]


def test_people_are_told_where_it_answers_and_what_to_try(shown: tuple[up.TextView, io.StringIO]) -> None:
    view, out = shown
    view.ready(FakeDeployment())  # type: ignore[arg-type]
    view.draining()
    told = out.getvalue()
    assert "ready: gRPC API of alora_serve.v1.AloraService on 127.0.0.1:50051" in told
    assert "model demo, adapters none: pass --adapters DIRECTORY" in told
    root = default_location()
    assert f"store: LMDB in {root}, kept for the next start; to free it once this has ended: rm -r {root}\n" in told
    assert "metrics of router: http://127.0.0.1:9/metrics" in told
    assert 'alora-serve generate --address 127.0.0.1:50051 --message "What' in told
    assert "draining: running requests may finish" in told


def test_another_store_is_shown_without_its_password(
    shown: tuple[up.TextView, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    view, out = shown
    settings = LocalSettings(store_url="redis://user:secret@127.0.0.1:6379/0")
    monkeypatch.setattr(FakeDeployment, "settings", settings)
    view.ready(FakeDeployment())  # type: ignore[arg-type]
    assert "store: redis://127.0.0.1:6379/0\n" in out.getvalue()
    assert "secret" not in out.getvalue()


def test_the_status_says_what_is_still_starting() -> None:
    console = Console(file=io.StringIO())
    status = console.status("")
    view = up.TextView(console, 1, status)
    view.event(Spawned("prefill", 1))
    view.event(Spawned("worker-1", 2))
    assert status.status == "starting prefill, worker-1"
    view.event(Listening("prefill", 1, "a", "b"))
    assert status.status == "starting worker-1"
    view.event(Exited("worker-1", 2, 1, False, 0.1))
    view.event(Spawned("router", 3))
    assert status.status == "starting router"


def test_machines_get_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    view = up.JsonView()
    for event in EVENTS[:5]:
        view.event(event)
    view.ready(FakeDeployment())  # type: ignore[arg-type]
    view.draining()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event": "notice", "message": "the budget is lowered"},
        {"event": "spawned", "process": "prefill", "pid": 11},
        {"event": "log", "process": "prefill", "line": "[bold]not markup[/]"},
        {
            "event": "listening",
            "process": "prefill",
            "pid": 11,
            "address": "127.0.0.1:1",
            "metrics_address": "127.0.0.1:2",
        },
        {
            "event": "exited",
            "process": "prefill",
            "pid": 11,
            "status": -9,
            "expected": False,
            "restart_in_seconds": 0.1,
        },
        {
            "event": "ready",
            "router_address": "127.0.0.1:50051",
            "store": f"LMDB in {default_location()}",
            "processes": {"router": {"pid": 13, "address": "127.0.0.1:50051", "metrics_address": "127.0.0.1:9"}},
        },
        {"event": "draining"},
    ]


class Recorder:
    """A view that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self._more = asyncio.Event()

    def event(self, event: object) -> None:
        self.told.append(event)
        self._more.set()

    def ready(self, deployment: object) -> None:
        self.event("ready")

    def draining(self) -> None:
        self.event("draining")

    async def wait_for(self, told: object) -> None:
        while told not in self.told:
            self._more.clear()
            await self._more.wait()

    def ends(self) -> list[tuple[str, int]]:
        return [(event.name, event.status) for event in self.told if isinstance(event, Exited)]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, spec: Callable[..., ProcessSpec], tmp_path: Path) -> dict[str, str]:
    """Deployments run small children in place of the services; the dictionary says how each behaves."""
    behaviours: dict[str, str] = {}

    def child(self: object, name: str, *arguments: object) -> ProcessSpec:
        return spec(behaviours.get(name, "serve"), name=name)

    async def ready(router: Listening, *, num_prefills: int, num_workers: int, tls: object) -> None:
        assert (router.name, num_prefills, num_workers, tls) == ("router", 1, 2, None)

    monkeypatch.setattr(deployment.LocalDeployment, "_spec", child)
    monkeypatch.setattr(deployment, "wait_router_ready", ready)
    return behaviours


@pytest.fixture
def options(tmp_path: Path) -> DeploymentOptions:
    return DeploymentOptions(workers=2, model=str(tmp_path), store_url=f"lmdb://{tmp_path}/kv")


async def test_a_signal_drains_router_then_workers_then_prefill(children, options: DeploymentOptions) -> None:
    recorder = Recorder()
    running = asyncio.create_task(up.serve_until_told(options, recorder))
    await recorder.wait_for("ready")
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    names = [name for name, _ in recorder.ends()]
    assert names[0] == "router"
    assert set(names[1:3]) == {"worker-1", "worker-2"}
    assert names[3] == "prefill"
    assert {status for _, status in recorder.ends()} == {0}


async def test_a_second_signal_ends_everything_at_once(children, options: DeploymentOptions) -> None:
    children["router"] = "deaf"
    recorder = Recorder()
    running = asyncio.create_task(up.serve_until_told(options, recorder))
    await recorder.wait_for("ready")
    os.kill(os.getpid(), signal.SIGINT)
    await recorder.wait_for("draining")
    os.kill(os.getpid(), signal.SIGINT)
    await running
    assert ("router", -signal.SIGKILL) in recorder.ends()


def test_what_a_process_wrote_before_it_failed_to_start_is_shown_once(
    options: DeploymentOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail(options: DeploymentOptions, view: up.View) -> None:
        view.event(LogLine("prefill", "error: no such model"))
        raise StartError("prefill did not start (exit status 2)", "error: no such model")

    monkeypatch.setattr(up, "serve_until_told", fail)
    with pytest.raises(ConfigError) as told:
        up.run(options, as_json=False)
    assert str(told.value) == "prefill did not start (exit status 2): see the last lines of its log"
    assert capsys.readouterr().out.count("no such model") == 1
    with pytest.raises(ConfigError, match="no such model"):
        up.run(options, as_json=True)


async def test_a_signal_during_the_start_ends_it(children, options: DeploymentOptions) -> None:
    children["prefill"] = "mute"
    recorder = Recorder()
    running = asyncio.create_task(up.serve_until_told(options, recorder))
    await recorder.wait_for(LogLine("prefill", "loading"))
    os.kill(os.getpid(), signal.SIGHUP)
    await running
    assert {name for name, _ in recorder.ends()} == {"prefill", "worker-1", "worker-2"}
    assert "ready" not in recorder.told


async def test_a_service_that_does_not_start_takes_the_others_down(children, options: DeploymentOptions) -> None:
    children["worker-2"] = "refuse"
    recorder = Recorder()
    with pytest.raises(ConfigError, match="worker-2 did not start"):
        await up.serve_until_told(options, recorder)
    assert {name for name, _ in recorder.ends()} == {"prefill", "worker-1", "worker-2"}
