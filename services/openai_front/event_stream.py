"""Server-sent events, and what becomes of the work behind an answer when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from alora_serve.errors import RequestCancelledError

DONE: Final = b"data: [DONE]\n\n"
SIGN_OF_LIFE: Final = b": the model is at work\n\n"
"""A comment, which clients skip and proxies see."""

LEFT: Final = "alora.client_left"
"""In a request's scope, once its client has left before the end of a stream."""

ResultT = TypeVar("ResultT")


def event(content: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come. When the client leaves, or takes none for too long, what makes them is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], *, write_timeout_seconds: float) -> None:
        super().__init__()
        del self.headers["content-length"]
        # Buffering proxies would turn a stream into one late answer.
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._write_timeout_seconds = write_timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        if sending.cancelled():
            scope[LEFT] = True
        else:
            sending.result()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for content in events:
                try:
                    async with asyncio.timeout(self._write_timeout_seconds):
                        await send({"type": "http.response.body", "body": content, "more_body": True})
                except TimeoutError:
                    # It reads no more, and would take nothing else either: the connection is closed unfinished.
                    raise asyncio.CancelledError from None
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_left(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of ``work``, which is cancelled when the client leaves. The request's body must have been read.

    Raises:
        RequestCancelledError: it left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestCancelledError("the client left before it was answered")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
