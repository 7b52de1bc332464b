"""Who can write to the store of running services, and knows the form of records, gives them nothing that they use."""

from __future__ import annotations

import struct

import pytest

from alora_serve.client import ChatMessage
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.record import HEADER_BYTES, RecordSpec, open_record, seal
from alora_serve.kv.sealed import SealedStore
from alora_serve.kv.store import StoreKey
from deployment import BLOCK_TOKENS, ServedModel, deployed, until_reused
from in_process import MemoryStore
from redis_servers import valkey_server

SECRET = "a secret of the store of these tests"
TURNS = [ChatMessage("user", "The bell tolls at noon, and the doves fly up. When does it toll?")]
BEGINNINGS = {"mac": b"aLSVm", "encrypt": b"aLSVe"}
RECORD_MAGIC = b"aLKV"


def opened(scheme: str, key: bytes, value: bytes) -> bytes:
    """The record in a sealed value, as only the services can read it."""
    inner, found = MemoryStore(), list[bytes]()
    inner.values[StoreKey(key)] = value
    store = SealedStore(inner, scheme, [SECRET.encode()])  # type: ignore[arg-type]
    store.get_many([StoreKey(key)], lambda _, record: found.append(bytes(record)), timeout_seconds=1)
    return found[0]


def forged(record: bytes) -> bytes:
    """The same record with other KV in it, whole in every respect that needs no secret."""
    fields = struct.unpack_from("<4sHBx32sHHHHIQ", record)
    _, _, _, key, first_layer, layers, kv_heads, head_dim, tokens, _ = fields
    layout = KVLayout(first_layer + layers, kv_heads, head_dim, "float32")
    spec = RecordSpec(StoreKey(key), layout, range(first_layer, first_layer + layers), tokens)
    open_record(spec, record)
    other = bytearray(HEADER_BYTES) + record[HEADER_BYTES:][::-1]
    seal(spec, other)
    open_record(spec, other)
    return bytes(other)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheme", BEGINNINGS)
async def test_a_record_that_nobody_sealed_is_a_miss_and_the_tokens_are_right(
    scheme: str, tiny_model: ServedModel
) -> None:
    settings = {"store_protection": scheme, "store_secrets": SECRET, "block_tokens": str(BLOCK_TOKENS)}
    forgetful = {"prefix_cache_bytes": "1", "always_fetch": "true"}
    with valkey_server() as valkey, valkey.client() as back_door:
        url = f"redis://{valkey.host}:{valkey.port}/0"
        async with deployed(tiny_model, url, **settings, **forgetful) as running:
            handle = (await running.client.prefill(TURNS)).handle
            expected = tiny_model.cold_tokens("guard", tiny_model.prompt(handle, "guard"))
            await until_reused(running.client, handle, "guard")

            values = {name: back_door.get(name) for name in back_door.scan_iter("alora:*")}
            assert len(values) >= len(handle.prefix_tokens) // BLOCK_TOKENS
            assert all(value.startswith(BEGINNINGS[scheme]) for value in values.values())
            if scheme == "encrypt":
                assert not any(RECORD_MAGIC in value for value in values.values())

            back_door.mset(
                {name: forged(opened(scheme, name.removeprefix(b"alora:"), value)) for name, value in values.items()}
            )
            answer = await running.ask(handle, "guard")
            assert answer.token_ids == expected
            assert answer.usage.fetched_tokens == 0
            assert answer.usage.store_misses["corrupt"] > 0

            await until_reused(running.client, handle, "guard")
            again = await running.ask(handle, "guard")
            assert again.token_ids == expected, "what took their place was sealed"
