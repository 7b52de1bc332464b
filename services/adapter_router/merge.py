"""Merges many streams into one, in the order their items come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

import structlog

from alora_serve.errors import AloraServeError
from alora_serve.v1 import types_pb2

ItemT = TypeVar("ItemT")

BUFFERED_ITEMS = 32
"""Items that wait for a slow reader. Each stream holds one more; gRPC's flow control stops the workers behind them."""


async def merge_streams(
    streams: Sequence[AsyncGenerator[ItemT, None]],
) -> AsyncGenerator[tuple[int, ItemT | AloraServeError], None]:
    """Items of all streams with the index of theirs; the last of a stream that failed is its error.

    One stream's failure leaves the others alone. Closing the merged stream closes all of them.
    """
    queue: asyncio.Queue[tuple[int, ItemT | AloraServeError | None]] = asyncio.Queue(BUFFERED_ITEMS)
    pumps = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def merge_samples(
    streams: Sequence[AsyncGenerator[types_pb2.GenerationEvent, None]], indexes: Sequence[int]
) -> AsyncGenerator[types_pb2.GenerationEvent, None]:
    """Events of all samples of one call, each with the index of its own. The first that fails ends all.

    Raises:
        AloraServeError: a sample's, with its ``sample_index`` in the metadata where there are several.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                event.sample_index = indexes[0]
                yield event
        return
    async with aclosing(merge_streams(streams)) as merged:
        async for position, item in merged:
            if isinstance(item, AloraServeError):
                item.metadata["sample_index"] = str(indexes[position])
                raise item
            item.sample_index = indexes[position]
            yield item


async def _pump(
    index: int,
    stream: AsyncGenerator[ItemT, None],
    queue: asyncio.Queue[tuple[int, ItemT | AloraServeError | None]],
) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                await queue.put((index, item))
    except AloraServeError as error:
        await queue.put((index, error))
    except Exception as bug:  # noqa: BLE001  # a bug in one stream must not take the others with it
        structlog.get_logger(__name__).exception("stream failed", index=index)
        await queue.put((index, AloraServeError(f"internal error: {type(bug).__name__}")))
    await queue.put((index, None))
