"""The demo model as a fixture: converted once into the user's cache, where later runs and other tests find it."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_serve.errors import ConfigError
from alora_serve.model.demo_model import ensure_demo_model


@pytest.fixture(scope="session")
def demo_model_directory() -> Path:
    """Directory of SmolLM2-135M-Instruct; skips where it can be neither found nor downloaded."""
    try:
        return ensure_demo_model()
    except ConfigError as error:
        pytest.skip(f"no demo model: {error}")
