"""Faults of each kind in miniature: no request fails, no token is wrong. ``make chaos`` makes all, and often."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.harness import CannotBreakError, Chaos
from run_chaos import SCENARIOS

from deployment import save_tiny_model

pytestmark = pytest.mark.timeout(300)


SHORT = (
    "worker hangs",
    "valkey faults",
    "certificate expired",
    "lmdb truncated while stopped",
    "lmdb truncated live",
    "rolling update",
    "next model",
    "mixed dtypes",
    "adapters change",
    "overload",
    "noisy tenant",
    "five hundred",
    "many requests",
)
"""What other tests hold in miniature is not here: dead workers and routers (``tests/integration/test_failover.py``),
partitions (``test_router_faults.py``), records of another version (``tests/unit/kv/test_record.py``), lost nodes and
masters (``tests/unit/kv/test_redis_faults.py``)."""


@pytest.mark.parametrize("name", SHORT)
async def test_no_request_fails_and_no_token_is_wrong(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    try:
        rows = await SCENARIOS[name](Chaos(model, 0, True, tmp_path))
    except CannotBreakError as error:
        pytest.skip(str(error))
    for row in rows:
        assert row.requests > 0, row
        assert (row.failed, row.wrong_tokens) == (0, 0), row
