"""The look at the adapter roots goes on, whatever one look ran into."""

from __future__ import annotations

import asyncio
from typing import Any

from structlog.testing import capture_logs

from adapter_decode.scan import scan_forever
from alora_serve.errors import ConfigError
from fake_services import until


class Roots:
    """A registry whose looks end in each of these in turn, and then well."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.looks = 0

    def refresh(self) -> None:
        self.looks += 1
        if self._failures:
            raise self._failures.pop(0)


async def test_a_look_that_fails_is_logged_and_not_the_last() -> None:
    roots: Any = Roots(ConfigError("away for a moment"), OverflowError("unforeseen"), MemoryError())
    with capture_logs() as logs:
        scanning = asyncio.create_task(scan_forever(roots, 0.0))
        await until(lambda: roots.looks > 3)
        assert not scanning.done()
        scanning.cancel()
    assert [line["log_level"] for line in logs] == ["warning", "error", "error"]
