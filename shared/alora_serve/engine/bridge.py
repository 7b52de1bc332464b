"""From the engine's thread to an event loop and back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from alora_serve.engine.engine import Engine
from alora_serve.engine.events import BaseComputed, SequenceDone, SequenceEvent, SequenceFailed
from alora_serve.engine.sequence_request import SequenceRequest


class _Mailbox:
    """What engines have for the sequences of one event loop. A step wakes the loop once, not once a token."""

    def __init__(self) -> None:
        self._events: deque[tuple[RunningSequence, SequenceEvent]] = deque()
        self._called = False

    def put(self, loop: asyncio.AbstractEventLoop, running: RunningSequence, event: SequenceEvent) -> None:
        """Leave an event, on an engine's thread."""
        self._events.append((running, event))
        if self._called and not loop.is_closed():
            return
        self._called = True
        try:
            loop.call_soon_threadsafe(self._empty)
        except RuntimeError:  # the loop is closed: nobody reads any more, nor what it was called for and never took
            for unread, left in self._events:
                unread.discard(left)
            self._events.clear()
            self._called = False

    def _empty(self) -> None:
        # First: what is put from here on calls again, and nothing is left lying.
        self._called = False
        while self._events:
            running, event = self._events.popleft()
            running.arrive(event)


_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = WeakKeyDictionary()


class RunningSequence:
    """The events of one sequence on an event loop, up to and including ``SequenceDone``.

    The queue needs no bound of its own, so that the engine's thread never waits for a reader: it holds ``max_tokens``
    tokens at most, a heartbeat a second, and a few events more. The server closes a reader whose client takes nothing,
    after ``write_timeout_seconds``.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[SequenceEvent] = asyncio.Queue()
        self._mailbox = _mailboxes.setdefault(self._loop, _Mailbox())
        self._left = False
        self.ended = False

    def sink(self, event: SequenceEvent) -> None:
        """Take an event on the engine's thread."""
        self._mailbox.put(self._loop, self, event)

    def arrive(self, event: SequenceEvent) -> None:
        """Take an event on the loop's thread."""
        if not self._left:
            self._events.put_nowait(event)
        else:
            self.discard(event)

    def discard(self, event: SequenceEvent) -> None:
        """Give back what an event that nobody reads holds."""
        if isinstance(event, BaseComputed):  # nobody is left to take over its pin
            self._engine.cache.release(event.prefix)

    def leave(self) -> None:
        """Nobody will read further events."""
        self._left = True
        while not self._events.empty():
            self.discard(self._events.get_nowait())

    async def __aiter__(self) -> AsyncIterator[SequenceEvent]:
        """Yield events.

        Raises:
            AloraServeError: what the sequence failed with.
        """
        while not self.ended:
            event = await self._events.get()
            self.ended = isinstance(event, SequenceDone | SequenceFailed)
            if isinstance(event, SequenceFailed):
                raise event.error
            yield event


@asynccontextmanager
async def run_sequence(engine: Engine, request: SequenceRequest) -> AsyncIterator[RunningSequence]:
    """Submit a sequence; iterate the result inside the ``async with`` block.

    Leaving the block early, for whatever reason, cancels the sequence: its place is free at the next step.

    Raises:
        UnavailableError: the engine is closed.
    """
    running = RunningSequence(engine)
    sequence_id = engine.submit(request, running.sink)
    try:
        yield running
    finally:
        running.leave()
        if not running.ended:
            engine.cancel(sequence_id)
