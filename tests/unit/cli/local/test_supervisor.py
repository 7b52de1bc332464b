from __future__ import annotations

import pytest

from alora_serve.cli.local.events import Exited
from alora_serve.errors import ConfigError, InvalidRequestError


async def test_processes_start_side_by_side_and_stop_in_stages(supervisor, ear, spec) -> None:
    listening = await supervisor.start([spec(name="b"), spec(name="a1"), spec(name="a2")])
    assert [one.name for one in listening] == ["b", "a1", "a2"]
    assert list(supervisor.processes) == ["b", "a1", "a2"]
    await supervisor.stop([["not started"], ["a1", "a2"], ["b"]], timeout_seconds=30)
    ends = ear.of(Exited)
    assert {end.name for end in ends[:2]} == {"a1", "a2"}
    assert ends[2].name == "b"
    assert [end.status for end in ends] == [0, 0, 0]


async def test_one_that_does_not_start_fails_the_start(supervisor, spec) -> None:
    with pytest.raises(ConfigError, match="bad did not start"):
        await supervisor.start([spec(name="good"), spec("refuse", name="bad")])


async def test_an_unknown_name_is_refused_with_the_known_ones(supervisor, spec) -> None:
    await supervisor.start([spec(name="one")])
    with pytest.raises(InvalidRequestError, match="no process is named 'two'; there are one"):
        supervisor.process("two")


async def test_abort_ends_all_at_once(supervisor, ear, spec) -> None:
    await supervisor.start([spec("deaf", name="one"), spec("deaf", name="two")])
    supervisor.abort()
    await supervisor.stop([["one", "two"]], timeout_seconds=600)
    assert {end.status for end in ear.of(Exited)} == {-9}
