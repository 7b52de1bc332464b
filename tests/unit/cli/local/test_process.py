from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import psutil
import pytest

from alora_serve.cli.local.events import Exited, Listening, LogLine, Spawned
from alora_serve.cli.local.process import RestartPolicy, SupervisedProcess
from alora_serve.errors import ConfigError, UnavailableError

Make = Callable[..., SupervisedProcess]


async def test_start_returns_where_the_process_listens(process: Make, ear) -> None:
    child = process()
    listening = await child.start()
    assert listening == Listening("child", child.pid, f"127.0.0.1:{child.pid}", f"127.0.0.1:{child.pid}")
    assert child.listening == listening
    assert [type(event) for event in ear.events if not isinstance(event, LogLine)] == [Spawned, Listening]


async def test_a_killed_process_is_started_again_on_the_same_addresses(process: Make, ear) -> None:
    child = process()
    first = await child.start()
    await child.kill()
    assert child.listening is None
    second = await child.wait_listening()
    assert second.pid != first.pid
    assert (second.address, second.metrics_address) == (first.address, first.metrics_address)
    (exited,) = ear.of(Exited)
    assert (exited.pid, exited.status, exited.expected) == (first.pid, -signal.SIGKILL, False)
    assert exited.restart_in_seconds == 0.01


async def test_a_process_that_keeps_dying_is_started_again_after_ever_longer_waits(process: Make, ear) -> None:
    await process("die").start()
    ends = await ear.wait(Exited, 5)
    assert [end.restart_in_seconds for end in ends[:5]] == [0.01, 0.02, 0.04, 0.05, 0.05]
    assert {end.status for end in ends} == {7}


async def test_a_process_that_listened_long_enough_is_not_held_to_earlier_deaths(ear, spec) -> None:
    patient = RestartPolicy(first_seconds=0.01, longest_seconds=0.05, forget_after_seconds=0.0)
    child = SupervisedProcess(spec("die"), ear, patient)
    await child.start()
    ends = await ear.wait(Exited, 3)
    assert {end.restart_in_seconds for end in ends} == {0.01}
    child.abort()
    await child.stop(10)


async def test_restart_drains_and_waits_for_the_fresh_process(process: Make, ear) -> None:
    child = process()
    first = await child.start()
    second = await child.restart()
    assert second.pid != first.pid
    assert second.address == first.address
    (exited,) = ear.of(Exited)
    assert (exited.status, exited.expected, exited.restart_in_seconds) == (0, True, 0.0)
    assert LogLine("child", "drained") in ear.events


async def test_a_process_that_never_listened_is_not_started_again_and_says_why(process: Make, ear) -> None:
    child = process("refuse")
    with pytest.raises(ConfigError, match=r"child did not start \(exit status 2\):\nerror: model='x': no such dir"):
        await child.start()
    assert [end.restart_in_seconds for end in ear.of(Exited)] == [None]
    assert child.pid is None
    assert child.listening is None


async def test_stop_drains_and_ends_for_good(process: Make, ear) -> None:
    child = process()
    listening = await child.start()
    await child.stop(30)
    assert not psutil.pid_exists(listening.pid)
    (exited,) = ear.of(Exited)
    assert (exited.status, exited.expected, exited.restart_in_seconds) == (0, True, None)
    with pytest.raises(UnavailableError, match="child was stopped"):
        await child.wait_listening()


async def test_a_process_deaf_to_sigterm_is_killed_when_its_time_is_over(process: Make, ear) -> None:
    child = process("deaf")
    await child.start()
    await child.stop(0.05)
    assert [end.status for end in ear.of(Exited)] == [-signal.SIGKILL]


async def test_abort_lets_a_stop_in_progress_return(process: Make, ear) -> None:
    child = process("deaf")
    await child.start()
    stopping = asyncio.create_task(child.stop(600))
    await asyncio.sleep(0)
    child.abort()
    await stopping
    assert [end.status for end in ear.of(Exited)] == [-signal.SIGKILL]


async def test_stop_ends_the_wait_before_a_restart(ear, spec) -> None:
    child = SupervisedProcess(spec("die"), ear, RestartPolicy(first_seconds=600, longest_seconds=600))
    await child.start()
    await ear.wait(Exited)
    await child.stop(30)
    assert len(ear.of(Spawned)) == 1


async def test_stop_before_the_process_exists_leaves_none_behind(process: Make, ear) -> None:
    child = process("deaf")
    starting = asyncio.create_task(child.start())
    await asyncio.sleep(0)
    await child.stop(600)
    with pytest.raises(UnavailableError):
        await starting
    assert all(not psutil.pid_exists(spawned.pid) for spawned in ear.of(Spawned))


async def test_a_process_that_is_not_running_cannot_be_signalled_or_awaited(process: Make) -> None:
    child = process()
    with pytest.raises(UnavailableError, match="child is not running"):
        child.send_signal(signal.SIGTERM)
    with pytest.raises(UnavailableError, match="child was not started"):
        await child.wait_listening()
    await child.stop(1)


async def test_what_a_process_writes_is_passed_on_line_by_line(process: Make, ear) -> None:
    await process("talk").start()
    heard = await ear.wait_until(LogLine, lambda heard: any("bad bytes" in event.line for event in heard))
    lines = [event.line for event in heard]
    assert {"loading", "not json {", '["event", "listening"]', "\ufffd bad bytes"} <= set(lines)
    assert "bar 3" in lines, "of a progress bar, only its last state is worth a line"
    assert not any("bar 1" in line for line in lines)


async def test_a_line_without_an_end_is_cut_instead_of_kept(process: Make, ear) -> None:
    child = process("talk")
    await child.start()
    cut = await ear.wait_until(LogLine, lambda heard: sum(event.line.count("x") for event in heard) >= 3 << 20)
    assert 1 << 20 < max(len(event.line) for event in cut) < 2 << 20
    await child.kill()
    await ear.wait(Exited)
    assert LogLine("child", "last without an end") in ear.events


async def test_ctrl_c_in_the_terminal_does_not_reach_the_child(process: Make) -> None:
    child = process()
    listening = await child.start()
    assert os.getpgid(listening.pid) != os.getpgid(0)
