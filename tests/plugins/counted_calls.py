"""A number of calls, several at a time, each counted by how it ended; and a backend that dies while it has some."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from alora_serve.errors import AloraServeError
from envoy_proxy import Envoy

CONCURRENCY = 4
KNOCKS = 8


@dataclass(slots=True)
class Counted:
    """How calls ended.

    Attributes:
        right: answered as without the fault.
        cut: streams that had begun and then broke: only who made them can go on with them.
        bad: all others, in words.
    """

    right: int = 0
    cut: int = 0
    bad: list[str] = field(default_factory=list)


class CutError(Exception):
    """A stream that had begun broke."""


async def make_calls(call: Callable[[int], Awaitable[str]], count: int) -> Counted:
    """Make ``call(0)`` to ``call(count - 1)``; each returns what is wrong with its answer, in words, or nothing."""
    counted, numbers = Counted(), iter(range(count))

    async def make_some() -> None:
        for number in numbers:
            try:
                wrong = await call(number)
            except CutError:
                counted.cut += 1
            except (AloraServeError, grpc.RpcError) as error:
                counted.bad.append(f"call {number}: {type(error).__name__}: {error}")
            else:
                counted.right += not wrong
                counted.bad += [f"call {number}: {wrong}"] if wrong else []

    await asyncio.gather(*(make_some() for _ in range(CONCURRENCY)))
    return counted


async def read_raw(call: Any) -> tuple[int, ...]:
    """The tokens of a stream of GenerationEvents, from a bare stub: it repeats nothing and goes on with nothing.

    A stream has begun once its headers have come: from then on no proxy can repeat it. Envoy can only reset it, which
    gRPC calls INTERNAL; what a router or worker says in its last moments is UNAVAILABLE.

    Raises:
        CutError: it had begun, and ended in one of these ways.
        grpc.RpcError: it failed otherwise.
    """
    packed = b""
    try:
        async for response in call:
            packed += response.event.chunk.token_ids
    except grpc.aio.AioRpcError as error:
        was_reset = error.code() is grpc.StatusCode.INTERNAL and "RST_STREAM" in (error.details() or "")
        if error.initial_metadata() and (was_reset or error.code() is grpc.StatusCode.UNAVAILABLE):
            raise CutError from error
        raise
    return tuple(int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4))


async def kill_in_the_middle(
    envoy: Envoy, address: str, pid: int, *, after_calls: int, knock: Callable[[], Awaitable[Any]]
) -> None:
    """Once Envoy has passed on ``after_calls``, kill a backend that has calls, some of them not answered yet.

    It is stopped before it is killed, so that what it has cannot end; ``knock`` makes a call that then waits for it.
    """
    await envoy.wait_for_calls(after_calls)
    # No more than the other one has, or Envoy would send it nothing new.
    await envoy.wait_for(lambda backends: 0 < backends[address].running <= CONCURRENCY)
    os.kill(pid, signal.SIGSTOP)
    try:
        calls = (await envoy.backends())[address].calls
        knocks = [asyncio.ensure_future(knock()) for _ in range(KNOCKS)]
        await envoy.wait_for(lambda backends: backends[address].calls > calls)
    finally:
        os.kill(pid, signal.SIGKILL)  # whatever failed: nobody would start what is only stopped again
    await asyncio.gather(*knocks)
