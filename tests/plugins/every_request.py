"""A conversation asked in every way that there is, so that every metric of it moves."""

from __future__ import annotations

import pytest

from alora_serve.client import AsyncClient, ChatMessage, Target
from alora_serve.errors import AdapterNotFoundError
from deployment import GREEDY, ServedModel


async def everything_once(client: AsyncClient, model: ServedModel, number: int) -> None:
    """Ask for answers, some that fail too, about a conversation that nobody had before, and reload an adapter."""
    turns = [ChatMessage("user", f"Number {number} of the seas is deep and salt, and ships go over it. Is it?")]
    handle = (await client.prefill(turns)).handle
    for adapter in (model.appended, model.answering, model.plain, ""):
        await client.generate(handle=handle, adapter=adapter, sampling=GREEDY).result()
    await client.fanout(turns, [Target(name, GREEDY) for name in (model.appended, model.answering, "")]).results()
    await client.score(None, ["Yes.", "No."], adapter=model.appended, handle=handle)
    intrinsics = [one.name for one in await client.list_adapters() if one.intrinsic_digest]
    if model.answering in intrinsics:
        await client.run_intrinsic(None, model.answering, handle=handle)
        await client.run_intrinsics(None, [model.answering], handle=handle).results()
    with pytest.raises(AdapterNotFoundError):
        await client.generate(turns, adapter="nobody's").result()
    await client.unload_adapter(model.plain)
    await client.load_adapter(model.plain)
