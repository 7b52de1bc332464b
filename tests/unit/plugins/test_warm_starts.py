"""A service that was forked from the warm process is all that tests take it for: a process like one started cold."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.request import urlopen

import coverage
import psutil
import pytest
import pytest_asyncio

import warm_starts
from alora_serve.cli.local.events import Exited, Listening, LogLine, ProcessEvent
from alora_serve.cli.local.process import ProcessSpec, RestartPolicy, SupervisedProcess
from alora_serve.cli.local.spawning import Child
from warm_starts import WarmServer

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all starts are cold"),
]

ROUTER = (sys.executable, "-P", "-m", "adapter_router")
FLAGS = ("--base-prefill-endpoints=127.0.0.1:1", "--decode-endpoints=127.0.0.1:2")
PLACES = ("--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0")
ROOT = Path(__file__).resolve().parents[3]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def warm() -> AsyncIterator[WarmServer]:
    """Becomes a router, whose imports take the least time."""
    server = await asyncio.to_thread(WarmServer, ["adapter_router"])
    yield server
    await asyncio.to_thread(server.close)


def environment_of(server: WarmServer, **more: str) -> dict[str, str]:
    return {**server.environment, "ALORA_HANDLE_SECRETS": "a secret of these tests", **more}


async def start_router(server: WarmServer, *flags: str, **more: str) -> Child:
    return await server.spawn((*ROUTER, *FLAGS, *PLACES, *flags), environment_of(server, **more))


async def listening(child: Child) -> dict[str, str]:
    assert child.stdout is not None
    said: dict[str, str] = json.loads(await child.stdout.readline())
    return said


def is_warm(pid: int) -> bool:
    """The command of a fork is its parent's."""
    return any("warm_server" in word for word in psutil.Process(pid).cmdline())


def answers(metrics_address: str) -> bool:
    with urlopen(f"http://{metrics_address}/metrics", timeout=30) as page:
        return "alora_" in page.read().decode()


async def test_it_has_outputs_a_session_and_a_directory_of_its_own_and_drains_on_sigterm(warm: WarmServer) -> None:
    child = await start_router(warm)
    assert is_warm(child.pid)
    assert (await listening(child))["service"] == "adapter-router"
    assert os.getsid(child.pid) == child.pid
    assert psutil.Process(child.pid).cwd() == str(Path.cwd())
    assert child.returncode is None
    os.kill(child.pid, signal.SIGTERM)
    assert child.stdout is not None
    assert child.stderr is not None
    log = await child.stderr.read()
    assert b'"draining"' in log
    assert await child.stdout.read() == b"", "its streams end with it"
    assert await child.wait() == child.returncode == 0


async def test_a_wrong_setting_ends_it_with_its_status_and_its_words(warm: WarmServer) -> None:
    by_flag = await start_router(warm, "--no-such-flag=1")
    by_variable = await start_router(warm, ALORA_NO_SUCH_VARIABLE="1")
    for child, named in ((by_flag, b"no-such-flag"), (by_variable, b"ALORA_NO_SUCH_VARIABLE")):
        assert child.stderr is not None
        assert named in await child.stderr.read()
        assert await child.wait() == 2


async def test_it_holds_no_file_of_the_warm_process_or_of_another_child(warm: WarmServer) -> None:
    first = await start_router(warm)
    second = await start_router(warm)
    await asyncio.gather(listening(first), listening(second))

    def pipes_and_pairs(pid: int) -> set[str]:
        links = [link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir()]
        return {name for name in links if name.startswith(("pipe:", "socket:"))}

    assert not pipes_and_pairs(first.pid) & pipes_and_pairs(second.pid)
    assert not pipes_and_pairs(second.pid) & pipes_and_pairs(warm.process.pid)
    for child in (first, second):
        child.kill()
        assert await child.wait() == -signal.SIGKILL


async def test_stopped_it_hangs_and_goes_on_when_told(warm: WarmServer) -> None:
    child = await start_router(warm)
    page = (await listening(child))["metrics_address"]
    os.kill(child.pid, signal.SIGSTOP)
    async with asyncio.timeout(30):
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert child.returncode is None, "stopped is not ended"
    os.kill(child.pid, signal.SIGCONT)
    assert await asyncio.to_thread(answers, page)
    child.kill()
    assert await child.wait() == -signal.SIGKILL
    child.kill()  # again, of what is dead, is nothing


async def test_supervised_and_killed_it_is_back_at_its_addresses(warm: WarmServer) -> None:
    told: list[ProcessEvent] = []
    spec = ProcessSpec("router", (*ROUTER, *FLAGS), environment_of(warm))
    router = SupervisedProcess(spec, told.append, RestartPolicy(first_seconds=0.01), warm.spawn)
    before = await router.start()
    await router.kill()
    after = await router.wait_listening()
    assert after.pid != before.pid
    assert (after.address, after.metrics_address) == (before.address, before.metrics_address)
    assert await asyncio.to_thread(answers, after.metrics_address)
    await router.stop(30)
    assert [event.status for event in told if isinstance(event, Exited)] == [-signal.SIGKILL, 0]
    assert [event.pid for event in told if isinstance(event, Listening)] == [before.pid, after.pid]
    assert any(isinstance(event, LogLine) and "draining" in event.line for event in told)


@pytest.mark.parametrize(
    "more", [{"OMP_NUM_THREADS": "2"}, {"PYTHONPATH": ""}, {"OTEL_PYTHON_CONTEXT": "contextvars_context"}]
)
async def test_what_is_read_before_a_service_runs_makes_the_start_cold(
    warm: WarmServer, more: Mapping[str, str]
) -> None:
    child = await start_router(warm, **more)
    assert not is_warm(child.pid)
    child.kill()
    await child.wait()


async def test_so_does_whatever_is_no_service(warm: WarmServer) -> None:
    child = await warm.spawn((sys.executable, "-P", "-m", "platform"), environment_of(warm))
    assert not is_warm(child.pid)
    assert await child.wait() == 0


async def test_so_does_the_variable(monkeypatch: pytest.MonkeyPatch, warm: WarmServer) -> None:
    monkeypatch.setenv(warm_starts.VARIABLE, "1")
    monkeypatch.setattr(warm_starts._shared, "get", lambda: warm)
    child = await warm_starts.spawn((*ROUTER, *FLAGS, *PLACES), environment_of(warm))
    assert not is_warm(child.pid)
    child.kill()
    await child.wait()
    monkeypatch.delenv(warm_starts.VARIABLE)
    child = await warm_starts.spawn((*ROUTER, *FLAGS, *PLACES), environment_of(warm))
    assert is_warm(child.pid)
    child.kill()
    await child.wait()


async def test_make_chaos_starts_cold() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nchaos:")[2].partition("\n\n")[0]
    assert f"{warm_starts.VARIABLE}=1" in recipe


async def test_its_coverage_is_measured(tmp_path: Path) -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'data_file = "build/coverage/data"' in settings
    (tmp_path / "pyproject.toml").write_text(settings.replace("build/coverage/data", str(tmp_path / "data")))
    variables = {**os.environ, "COVERAGE_PROCESS_START": str(tmp_path / "pyproject.toml")}
    variables.pop("COVERAGE_PROCESS_CONFIG", None)
    server = await asyncio.to_thread(WarmServer, ["adapter_router"], variables)
    source = ROOT / "shared" / "alora_serve" / "rpc" / "server.py"
    imported, served = "import grpc", '    log.info("stopped")'
    of_the_child: list[str] = []
    for _ in range(3):  # coverage was seen, once, to lose what a child had run
        child = await start_router(server)
        await listening(child)
        os.kill(child.pid, signal.SIGTERM)
        assert await child.wait() == 0
        if of_the_child := lines_run(tmp_path, child.pid, source):
            break
    await asyncio.to_thread(server.close)
    assert served in of_the_child
    assert imported not in of_the_child, "what the warm process has measured already"
    assert imported in lines_run(tmp_path, server.process.pid, source)


def lines_run(directory: Path, pid: int, source: Path) -> list[str]:
    """What a process is known to have run of a file."""
    [measured] = directory.glob(f"data.*.pid{pid}.*")
    data = coverage.CoverageData(str(measured))
    data.read()
    text = source.read_text().splitlines()
    names = [name for name in data.measured_files() if Path(name).resolve() == source]
    return [text[number - 1] for name in names for number in data.lines(name) or []]


async def test_it_does_not_outlive_the_warm_process_nor_that_the_tests() -> None:
    server = await asyncio.to_thread(WarmServer, ["adapter_router"])
    child = await start_router(server)
    await listening(child)
    process = psutil.Process(child.pid)
    server._control.close()  # as when the tests' process dies
    assert await asyncio.to_thread(server.process.wait, 30) == 0
    assert await child.wait() == -signal.SIGKILL
    async with asyncio.timeout(30):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110  # maybe unburied
            await asyncio.sleep(0.01)


async def test_a_warm_process_with_a_second_thread_refuses_to_fork(tmp_path: Path) -> None:
    (tmp_path / "busy").mkdir()
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
    (tmp_path / "busy" / "__main__.py").write_text(program)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.raises(RuntimeError, match="2 threads where there may be one"):
        await asyncio.to_thread(WarmServer, ["busy"], {**os.environ, "PYTHONPATH": path})
