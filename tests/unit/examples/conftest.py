"""Where the examples are."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def examples_directory(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.rootpath, "examples")
