"""A watcher hears of every change, and of nothing at least once a second."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from alora_serve.rpc import watch
from alora_serve.types import EndpointStatus, ModelInfo

MODEL = ModelInfo("m", b"1", b"2", "Llama", "float32", 512, 320, 16, 100)


def alive() -> bool:
    return True


async def test_the_status_is_told_at_once_and_after_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.001)
    statuses = [EndpointStatus(MODEL), EndpointStatus(MODEL), EndpointStatus(MODEL, running=1)]
    last = statuses[-1]

    def status() -> EndpointStatus:
        return statuses.pop(0) if statuses else last

    async with aclosing(watch.watch_status(status, alive)) as told:
        assert await anext(told) == EndpointStatus(MODEL)
        assert await anext(told) == EndpointStatus(MODEL, running=1)
    assert not statuses


async def test_an_unchanged_status_is_repeated_so_that_quiet_is_not_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(watch, "REPEAT_SECONDS", 0.01)
    same = EndpointStatus(MODEL)
    async with aclosing(watch.watch_status(lambda: replace(same), alive)) as told:
        assert [await anext(told) for _ in range(3)] == [same] * 3


async def test_of_an_engine_that_hangs_nothing_is_told_not_even_to_who_asks_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(watch, "REPEAT_SECONDS", 0.001)
    lives = True
    async with aclosing(watch.watch_status(lambda: EndpointStatus(MODEL), lambda: lives)) as told:
        await anext(told)
        lives = False
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(told), 0.1)
    async with aclosing(watch.watch_status(lambda: EndpointStatus(MODEL), lambda: lives)) as told:
        waiting = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        lives = True
        assert await waiting == EndpointStatus(MODEL)
