"""A tenant's work waits for that tenant's own alone."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import pytest

from alora_serve.engine.turns import TURNS, Turns

PATIENCE_SECONDS = 30.0
ASKED: ContextVar[str] = ContextVar("asked")


class Work:
    """Goes on until it is told to end."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.ends = threading.Event()

    def __call__(self) -> str:
        self.begun.release()
        assert self.ends.wait(PATIENCE_SECONDS)
        return "done"

    async def has_begun(self) -> bool:
        return await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE_SECONDS)


async def test_a_tenant_who_uses_all_turns_holds_up_no_other() -> None:
    turns, work = Turns(), Work()
    mine = [asyncio.ensure_future(turns.run(b"mine", work)) for _ in range(TURNS + 3)]
    for _ in range(TURNS):
        assert await work.has_begun()
    assert await turns.run(b"yours", lambda: "yours") == "yours"
    assert not work.begun.acquire(blocking=False), "the rest waits"
    work.ends.set()
    assert await asyncio.gather(*mine) == ["done"] * (TURNS + 3)


async def test_who_leaves_before_a_turn_costs_none_and_who_leaves_after_keeps_it_to_the_end() -> None:
    turns, work = Turns(), Work()
    begun = [asyncio.ensure_future(turns.run(b"", work)) for _ in range(TURNS)]
    for _ in range(TURNS):
        assert await work.has_begun()
    waiting = asyncio.ensure_future(turns.run(b"", work))
    last = asyncio.ensure_future(turns.run(b"", lambda: "last"))
    await asyncio.sleep(0)
    for task in (*begun, waiting):
        task.cancel()
    await asyncio.wait([*begun, waiting])
    done, _ = await asyncio.wait([last], timeout=0.05)
    assert not done, "what has begun still runs"
    work.ends.set()
    assert await last == "last"
    assert not work.begun.acquire(blocking=False), "nobody waited for the third"


async def test_work_fails_for_who_waits_and_knows_whose_it_is() -> None:
    turns = Turns()
    ASKED.set("request-1")
    assert await turns.run(b"", ASKED.get) == "request-1"
    with pytest.raises(ZeroDivisionError):
        await turns.run(b"", lambda: 1 / 0)
    for _ in range(TURNS + 1):
        assert await turns.run(b"", lambda: "still") == "still"


async def test_a_thread_that_cannot_be_started_takes_no_turn_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a container's limit of threads."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    turns, work = Turns(), Work()
    begun = asyncio.ensure_future(turns.run(b"", work))
    assert await work.has_begun()
    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        for _ in range(TURNS):
            with pytest.raises(RuntimeError, match="new thread"):
                await asyncio.wait_for(turns.run(b"", lambda: "never"), PATIENCE_SECONDS)
    done, _ = await asyncio.wait([asyncio.ensure_future(turns.run(b"", lambda: "done"))], timeout=PATIENCE_SECONDS / 2)
    assert [task.result() for task in done] == ["done"], "while the first is at it"
    work.ends.set()
    await begun
