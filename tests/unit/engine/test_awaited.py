"""What was begun for a caller who left is given back when it is there."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from alora_serve.engine.awaited import Awaited


async def test_a_result_is_taken_once_it_is_there() -> None:
    gate, given_back = asyncio.Event(), list[int]()

    async def work() -> int:
        await gate.wait()
        return 7

    with Awaited(work(), given_back.append) as awaited:
        assert not await awaited.done_within(0.01)
        gate.set()
        assert await awaited.done_within(5.0)
        assert awaited.take() == 7
    await asyncio.sleep(0)
    assert given_back == []


async def test_what_comes_after_its_caller_left_is_given_back() -> None:
    gate, given_back = asyncio.Event(), asyncio.Queue[int]()

    async def work() -> int:
        await gate.wait()
        return 7

    with suppress(ZeroDivisionError), Awaited(work(), given_back.put_nowait) as awaited:
        assert not await awaited.done_within(0.0)
        raise ZeroDivisionError
    assert given_back.empty()
    gate.set()
    assert await asyncio.wait_for(given_back.get(), 5.0) == 7


async def test_a_failure_is_the_callers_or_nobodys() -> None:
    given_back = list[int]()

    async def work() -> int:
        raise KeyError("lost")

    with Awaited(work(), given_back.append) as awaited:
        assert await awaited.done_within(5.0)
        with pytest.raises(KeyError):
            awaited.take()
    with Awaited(work(), given_back.append):
        pass
    await asyncio.sleep(0.01)
    assert given_back == []


async def test_what_may_be_cancelled_is_when_its_caller_leaves() -> None:
    given_back, ended = list[int](), asyncio.Event()

    async def work() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return 7

    with Awaited(work(), given_back.append, cancels=True) as awaited:
        assert not await awaited.done_within(0.01)
    await asyncio.wait_for(ended.wait(), 5.0)

    async def quick() -> int:
        return 8

    with Awaited(quick(), given_back.append, cancels=True) as awaited:
        assert await awaited.done_within(5.0)
    await asyncio.sleep(0)
    assert given_back == [8], "it had come to its end"
