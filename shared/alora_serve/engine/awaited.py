"""Work that one caller waits for, and may leave: what it comes to is given back then, so that nothing stays held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

ResultT = TypeVar("ResultT")


class Awaited(Generic[ResultT]):
    """Work begun when this is made. A context manager: leaving it before :meth:`take` lets the work finish unseen.

    Work in a thread cannot be cancelled, and what it has acquired by then would be nobody's.

    Args:
        work: what is waited for.
        give_back: lets go of a result that nobody took.
        cancels: leaving it cancels the work, which then lets go of all it has by itself.
    """

    def __init__(
        self, work: Coroutine[Any, Any, ResultT], give_back: Callable[[ResultT], None], *, cancels: bool = False
    ) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._give_back = give_back
        self._cancels = cancels
        self._taken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._taken:
            self._task.add_done_callback(self._discard)
            if self._cancels:
                self._task.cancel()

    async def done_within(self, seconds: float) -> bool:
        """Wait so long at most; whether :meth:`take` has something to take."""
        done, _ = await asyncio.wait((self._task,), timeout=seconds)
        return bool(done)

    async def result(self) -> ResultT:
        """Wait for it and :meth:`take` it."""
        await asyncio.wait((self._task,))
        return self.take()

    def take(self) -> ResultT:
        """The result, the caller's from here on; or raise what the work raised."""
        self._taken = True
        return self._task.result()

    def _discard(self, task: asyncio.Task[ResultT]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._give_back(task.result())
