"""The child's side of :mod:`systems.child`: a line in, a line out."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from process_settings import thread_settings, torch_threads


def answer_lines(prepare: Callable[[dict[str, Any]], object]) -> None:
    """Serve until standard input ends.

    Args:
        prepare: makes, from the settings, the object whose methods (plain or async) answer.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get between the replies
    asyncio.run(_serve(prepare(json.loads(sys.argv[1])), replies))


async def _serve(target: object, replies: Any) -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer = await _answer(target, json.loads(line))
        print(json.dumps(answer), file=replies, flush=True)


async def _answer(target: object, request: dict[str, Any]) -> Mapping[str, object]:
    name = request.pop("do")
    if name == "ready":
        return {"result": {"environment": thread_settings(os.environ), "torch_threads": torch_threads()}}
    try:
        result = getattr(target, name)(**request)
        return {"result": await result if inspect.isawaitable(result) else result}
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
