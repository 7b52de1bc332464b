"""Settings of a decode worker."""

from __future__ import annotations

from alora_serve.config import AdapterSettings, PrefillSettings, ServerSettings
from alora_serve.engine.startup import CoreSettings


class AdapterDecodeSettings(ServerSettings, CoreSettings, AdapterSettings, PrefillSettings):
    """Generates with base weights and any adapter on prefilled conversations."""
