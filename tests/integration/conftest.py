"""Deployments that tests share, since processes with torch take seconds to start. They live on the session's loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from deployment import (
    BATCH,
    BLOCK_TOKENS,
    QUEUE,
    Deployed,
    ServedModel,
    deployed,
    save_smollm2_adapters,
    save_tiny_model,
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tiny(tiny_model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployed]:
    """The tiny model behind real processes."""
    store = tmp_path_factory.mktemp("store")
    settings = {"max_batch_sequences": str(BATCH), "max_queue": str(QUEUE), "block_tokens": str(BLOCK_TOKENS)}
    async with deployed(tiny_model, f"lmdb://{store}", **settings) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def smollm2(
    demo_model_directory: Path, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Deployed]:
    """SmolLM2 and trained adapters behind real processes, with the default settings."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("smollm2")
    examples = pytestconfig.rootpath / "examples" / "intrinsics"
    model = save_smollm2_adapters(demo_model_directory, examples, root / "adapters")
    async with deployed(model, f"lmdb://{root / 'store'}", store_budget_bytes="256MiB") as running:
        yield running


@pytest.fixture(params=["tiny", "smollm2"])
def running(request: pytest.FixtureRequest) -> Deployed:
    """Either deployment, for what must hold of both."""
    deployment: Deployed = request.getfixturevalue(request.param)
    return deployment
