"""Many streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from adapter_router.merge import BUFFERED_ITEMS, merge_streams
from alora_serve.errors import AloraServeError, OverloadedError


async def counting(count: int, error: Exception | None = None) -> AsyncGenerator[int, None]:
    for number in range(count):
        yield number
    if error is not None:
        raise error


async def test_each_streams_items_keep_their_order_and_index() -> None:
    merged = [item async for item in merge_streams([counting(3), counting(0), counting(2)])]
    assert [number for index, number in merged if index == 0] == [0, 1, 2]
    assert [number for index, number in merged if index == 2] == [0, 1]
    assert len(merged) == 5


async def test_an_error_is_the_last_item_of_its_stream_and_of_no_other() -> None:
    full = OverloadedError("full")
    merged = [item async for item in merge_streams([counting(1, full), counting(2)])]
    assert (0, full) in merged
    assert [number for index, number in merged if index == 1] == [0, 1]


async def test_a_bug_in_one_stream_is_an_internal_error_without_its_text() -> None:
    merged = [item async for item in merge_streams([counting(0, ZeroDivisionError("secret")), counting(1)])]
    errors = [item for _, item in merged if isinstance(item, AloraServeError)]
    assert [type(error) for error in errors] == [AloraServeError]
    assert "secret" not in str(errors[0])
    assert (1, 0) in merged


async def test_closing_closes_every_stream_at_once() -> None:
    closed = []

    async def endless(index: int) -> AsyncGenerator[int, None]:
        try:
            while True:
                yield index
        finally:
            closed.append(index)

    async with aclosing(merge_streams([endless(0), endless(1)])) as merged:
        await anext(merged)
    assert sorted(closed) == [0, 1]


async def test_a_reader_that_stops_stops_the_streams() -> None:
    produced = 0

    async def endless() -> AsyncGenerator[int, None]:
        nonlocal produced
        while True:
            produced += 1
            yield produced
            await asyncio.sleep(0)

    async with aclosing(merge_streams([endless()])) as merged:
        await anext(merged)
        for _ in range(10 * BUFFERED_ITEMS):
            await asyncio.sleep(0)
        assert produced <= BUFFERED_ITEMS + 2
