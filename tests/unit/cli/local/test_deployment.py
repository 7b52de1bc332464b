from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from alora_serve.cli.local import deployment
from alora_serve.cli.local.deployment import DeploymentOptions, LocalDeployment, example_adapter_roots
from alora_serve.cli.local.events import Exited, Notice, ProcessEvent
from alora_serve.cli.local.process import ProcessSpec
from alora_serve.cli.local.spawning import Child, spawn_tethered
from alora_serve.cli.local.store_room import StorePlace
from alora_serve.errors import ConfigError, UnavailableError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HANDLE_SECRETS", "MODEL", "STORE_URL", "ADAPTER_ROOTS", "THREADS"):
        monkeypatch.delenv(f"ALORA_{name}", raising=False)
    monkeypatch.setattr(deployment, "ensure_demo_model", lambda: None)


def prepared(options: DeploymentOptions, emit=lambda event: None) -> dict[str, str]:
    """The environment that services would get."""
    return LocalDeployment(options, emit=emit)._prepare()


def test_options_become_settings_of_every_service(tmp_path: Path) -> None:
    options = DeploymentOptions(
        model=str(tmp_path),
        store_url="redis://127.0.0.1:1/0",
        adapter_roots=(tmp_path / "a", tmp_path / "b"),
        dtype="float32",
        threads=3,
        drain_seconds=2.0,
        settings={"max_queue": "7", "tenant_salt": "salt", "block_tokens": "8"},
    )
    environment = prepared(options)
    assert {name: environment[f"ALORA_{name}"] for name in ("MODEL", "STORE_URL", "DTYPE", "THREADS")} == {
        "MODEL": str(tmp_path),
        "STORE_URL": "redis://127.0.0.1:1/0",
        "DTYPE": "float32",
        "THREADS": "3",
    }
    assert environment["ALORA_ADAPTER_ROOTS"] == f"{tmp_path}/a,{tmp_path}/b"
    assert environment["ALORA_MAX_QUEUE"] == "7"
    assert environment["ALORA_TENANT_SALT"] == "salt"
    assert environment["ALORA_BLOCK_TOKENS"] == "8"
    assert environment["ALORA_DRAIN_SECONDS"] == "2.0"
    assert environment["OMP_NUM_THREADS"] == "3"


def test_what_options_leave_open_comes_from_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALORA_STORE_URL", "redis://127.0.0.1:2/0")
    monkeypatch.setenv("ALORA_ADAPTER_ROOTS", str(tmp_path))
    monkeypatch.setenv("ALORA_DRAIN_SECONDS", "120")
    deployment = LocalDeployment(DeploymentOptions())
    environment = deployment._prepare()
    assert environment["ALORA_STORE_URL"] == "redis://127.0.0.1:2/0"
    assert environment["ALORA_DRAIN_SECONDS"] == "120"
    assert deployment.settings.drain_seconds == 120, "it waits as long"
    assert environment["ALORA_ADAPTER_ROOTS"] == str(tmp_path)


def test_each_deployment_signs_with_a_secret_of_its_own_unless_there_is_one(monkeypatch, tmp_path: Path) -> None:
    options = DeploymentOptions(model=str(tmp_path))
    first, second = (prepared(options)["ALORA_HANDLE_SECRETS"] for _ in range(2))
    assert first != second
    assert len(first) >= 32
    given = DeploymentOptions(model=str(tmp_path), settings={"handle_secrets": "of the options, 16+"})
    assert prepared(given)["ALORA_HANDLE_SECRETS"] == "of the options, 16+"
    monkeypatch.setenv("ALORA_HANDLE_SECRETS", "of the environment")
    assert prepared(options)["ALORA_HANDLE_SECRETS"] == "of the environment"


def test_a_store_that_had_to_be_moved_is_moved_for_all_and_said(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deployment, "place_store", lambda url, size: StorePlace("lmdb:///elsewhere", 5, ("moved",)))
    told: list[ProcessEvent] = []
    environment = prepared(DeploymentOptions(model=str(tmp_path)), told.append)
    assert environment["ALORA_STORE_URL"] == "lmdb:///elsewhere"
    assert environment["ALORA_STORE_BUDGET_BYTES"] == "5"
    assert told == [Notice("moved")]


def test_a_checkout_serves_its_examples_and_an_installed_package_has_none(monkeypatch, tmp_path: Path) -> None:
    module = tmp_path / "shared" / "alora_serve" / "__init__.py"
    monkeypatch.setattr("alora_serve.__file__", str(module))
    assert example_adapter_roots() == ()
    (tmp_path / "examples" / "intrinsics").mkdir(parents=True)
    assert example_adapter_roots() == (tmp_path / "examples" / "intrinsics",)


def test_services_are_run_as_modules_without_the_current_directory(tmp_path: Path) -> None:
    spec = LocalDeployment(DeploymentOptions())._spec("worker-1", "adapter_decode", {"A": "b"})
    assert spec.command == (sys.executable, "-P", "-m", "adapter_decode")
    assert (spec.listen, spec.metrics_listen) == ("127.0.0.1:0", "127.0.0.1:0")


async def test_no_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="workers=0: at least one"):
        await LocalDeployment(DeploymentOptions(workers=0)).start()


async def test_addresses_are_refused_while_there_are_none() -> None:
    idle = LocalDeployment(DeploymentOptions(workers=2))
    assert idle.processes == {}
    assert idle.worker_names == ("worker-1", "worker-2")
    with pytest.raises(UnavailableError, match="was not started"):
        _ = idle.settings
    with pytest.raises(UnavailableError, match="router is not listening"):
        _ = idle.router_address


@pytest.fixture
def spawned() -> list[str]:
    """Names of what was started, in that order."""
    return []


@pytest.fixture
async def running(monkeypatch, spec, spawned: list[str], tmp_path: Path) -> AsyncIterator[LocalDeployment]:
    """A deployment of small children in place of the services."""

    def named(one: ProcessSpec) -> ProcessSpec:
        return replace(one, environment={**one.environment, "NAME": one.name})

    async def spawn(command: Sequence[str], environment: Mapping[str, str]) -> Child:
        spawned.append(environment["NAME"])
        return await spawn_tethered(command, environment)

    async def ready(router: object, **expected: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(LocalDeployment, "_spec", lambda self, name, *rest: named(spec("serve", name=name)))
    monkeypatch.setattr(deployment, "wait_router_ready", ready)
    options = DeploymentOptions(model=str(tmp_path), store_url=f"lmdb://{tmp_path}/kv")
    async with LocalDeployment(options, spawn=spawn) as local:
        yield local


async def test_every_start_is_made_in_the_way_that_was_chosen(running: LocalDeployment, spawned: list[str]) -> None:
    await running.kill("worker-1")
    await running.wait_listening("worker-1")
    await running.restart("router")
    assert sorted(spawned[:2]) == ["prefill", "worker-1"]
    assert spawned[2:] == ["router", "worker-1", "router"]


async def test_a_fresh_process_may_get_another_environment(running: LocalDeployment) -> None:
    process = running._supervisor.process("worker-1")
    before = dict(process.environment)
    await running.restart("worker-1", environment={"ALORA_DTYPE": "bfloat16"})
    assert process.environment == {**before, "ALORA_DTYPE": "bfloat16"}
    await running.restart("worker-1")
    assert process.environment["ALORA_DTYPE"] == "bfloat16", "from now on"


async def test_processes_are_killed_and_restarted_by_name_and_keep_their_addresses(running: LocalDeployment) -> None:
    before = dict(running.processes)
    assert list(before) == ["prefill", "worker-1", "router"]
    assert running.router_address == before["router"].address
    await running.kill("worker-1")
    assert "worker-1" not in running.processes
    back = await running.wait_listening("worker-1")
    assert (back.address, back.pid == before["worker-1"].pid) == (before["worker-1"].address, False)
    await running.restart("prefill", "worker-1")
    after = running.processes
    assert {name: one.address for name, one in after.items()} == {name: one.address for name, one in before.items()}
    assert after["prefill"].pid != before["prefill"].pid
    assert after["router"].pid == before["router"].pid


async def test_a_start_that_fails_leaves_no_process_behind(monkeypatch, spec, tmp_path: Path) -> None:
    def child(self: object, name: str, *rest: object) -> ProcessSpec:
        return spec("refuse" if name == "prefill" else "deaf", name=name)

    monkeypatch.setattr(LocalDeployment, "_spec", child)
    told: list[ProcessEvent] = []
    options = DeploymentOptions(model=str(tmp_path), store_url=f"lmdb://{tmp_path}/kv")
    with pytest.raises(ConfigError, match="prefill did not start"):
        async with LocalDeployment(options, emit=told.append):
            pass
    assert {event.name for event in told if isinstance(event, Exited)} == {"prefill", "worker-1"}
