"""Settings of the base-prefill service."""

from __future__ import annotations

from alora_serve.config import ServerSettings
from alora_serve.engine.startup import CoreSettings


class BasePrefillSettings(ServerSettings, CoreSettings):
    """Prefills conversations with base weights and stores their KV for decode workers."""
