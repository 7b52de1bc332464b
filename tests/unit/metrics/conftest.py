"""A registry of the test's own, and what it shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def value(registry: CollectorRegistry) -> Callable[..., float | None]:
    """Reads a sample by name and labels."""

    def read(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"alora_{name}", labels)

    return read
