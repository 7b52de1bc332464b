"""One deployment for all of these tests: a base prefill, two decode workers and a router; and a guarded router."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

from alora_serve.cli.local.process import RestartPolicy
from deployment import BLOCK_TOKENS, Deployed, ServedModel, deployed, save_tiny_model
from guarded_router import Guarded, guarded_router

DEAD_SECONDS = 1.0
"""How long a process that was killed stays dead, beyond the time that it takes to start."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def slow_return() -> RestartPolicy:
    return RestartPolicy(first_seconds=DEAD_SECONDS, longest_seconds=DEAD_SECONDS)


@pytest.fixture(scope="session")
def shared() -> list[Deployed]:
    """The deployment, once a test has needed it."""
    return []


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def all_serve_again(shared: list[Deployed]) -> AsyncIterator[None]:
    """Whatever a test killed is back before the next one, also after a test that failed."""
    yield
    for running in shared:
        await running.local.wait_ready()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def serving(
    tiny_model: ServedModel,
    slow_return: RestartPolicy,
    shared: list[Deployed],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Deployed]:
    store = tmp_path_factory.mktemp("store")
    async with deployed(
        tiny_model, f"lmdb://{store}", workers=2, drain_seconds=60, policy=slow_return, block_tokens=str(BLOCK_TOKENS)
    ) as running:
        shared.append(running)
        yield running
        shared.clear()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def guarded(serving: Deployed, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    async with guarded_router(serving, tmp_path_factory.mktemp("guarded")) as router:
        yield router
