"""Processes die by SIGKILL and come back or are replaced; nobody has to do anything, and no token changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest
import pytest_asyncio

from alora_serve.client import ChatMessage
from deployment import BLOCK_TOKENS, Deployed, ServedModel, deployed
from redis_servers import valkey_server

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

WORKERS = ("worker-1", "worker-2")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["lmdb", "valkey"])
async def pair(
    request: pytest.FixtureRequest, tiny_model: ServedModel, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Deployed]:
    """Two decode workers on one store."""
    with ExitStack() as stack:
        if request.param == "lmdb":
            url = f"lmdb://{tmp_path_factory.mktemp('store')}"
        else:
            valkey = stack.enter_context(valkey_server())
            url = f"redis://{valkey.host}:{valkey.port}/0"
        async with deployed(tiny_model, url, workers=2, block_tokens=str(BLOCK_TOKENS)) as running:
            yield running


async def test_a_second_worker_cold_on_the_same_store_fetches_and_does_not_recompute(pair: Deployed) -> None:
    turns = [ChatMessage("user", "The sea is deep and salt, and ships go over it. Is it deep?")]
    handle = (await pair.client.prefill(turns)).handle
    before = {name: await pair.metric(name, "alora_tokens_total", source="generated") for name in WORKERS}
    expected = await pair.ask(handle, "guard")
    assert expected.token_ids == pair.model.cold_tokens("guard", pair.model.prompt(handle, "guard"))
    [asked] = [
        name for name in WORKERS if await pair.metric(name, "alora_tokens_total", source="generated") > before[name]
    ]
    [other] = {*WORKERS} - {asked}
    assert await pair.metric(other, "alora_fetched_bytes_total") == 0, "it has never seen the conversation"

    await pair.local.kill(asked)
    # The router may not have noticed: a call that finds the worker dead goes to the other one by itself.
    answer = await pair.ask(handle, "guard")
    assert answer.token_ids == expected.token_ids
    assert answer.usage.fetched_bytes > 0
    assert answer.usage.fetched_tokens == answer.usage.cached_tokens == len(handle.prefix_tokens)
    assert answer.usage.computed_tokens == len(pair.model.invocations["guard"])
    assert await pair.metric(other, "alora_fetched_bytes_total") == answer.usage.fetched_bytes
    await pair.local.wait_ready()


async def test_each_service_killed_serves_again_on_its_port_with_the_same_tokens(pair: Deployed) -> None:
    turns = [ChatMessage("user", "The moon is far and round, and nobody lives there. Is it far?")]
    handle = (await pair.client.prefill(turns)).handle
    expected = {name: pair.model.cold_tokens(name, pair.model.prompt(handle, name)) for name in ("guard", "")}
    for name in ("prefill", *WORKERS, "router"):
        before = pair.local.processes[name]
        await pair.local.kill(name)
        after = await pair.local.wait_listening(name)
        assert after.pid != before.pid
        assert (after.address, after.metrics_address) == (before.address, before.metrics_address)
        await pair.local.wait_ready()
        await pair.client.wait_ready()
        again = await pair.client.prefill(turns)
        assert again.usage.computed_tokens == 0, "the store outlived it"
        for adapter, tokens in expected.items():
            result = await pair.ask(again.handle, adapter)
            assert result.token_ids == tokens, f"{adapter or 'base'} after the death of {name}"
            assert result.usage.computed_tokens <= len(pair.model.suffix(handle, adapter))
