"""Settings of a decode worker."""

from __future__ import annotations

from alora_serve.config import AdapterSettings, ServerSettings
from alora_serve.engine.startup import CoreSettings


class AdapterDecodeSettings(ServerSettings, CoreSettings, AdapterSettings):
    """Generates with base weights and any adapter on prefilled conversations."""
