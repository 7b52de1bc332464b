"""Loads the base model and looks at every adapter exactly as a worker does; prints what it found as JSON.

``python -m alora_serve.cli.model_check`` is a process of its own so that the command line needs no torch, and so that
`doctor` can still report when loading ends in a crash. Settings come from the environment and flags, as for a worker.
"""

from __future__ import annotations

import json
import sys

from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.config import AdapterSettings, ModelSettings, run_with_settings
from alora_serve.engine.startup import open_model
from alora_serve.errors import AloraServeError
from alora_serve.model.device import device_name


class CheckSettings(ModelSettings, AdapterSettings):
    """Looks at a base model and its adapters, and ends."""


def main() -> None:
    """Print one JSON object: model, dtype, device, context and adapters with their problems; or only ``error``."""
    settings = run_with_settings(CheckSettings)
    try:
        model = open_model(settings)
        registry = AdapterRegistry(settings.adapter_roots, base=AdapterHost.of(model), max_resident_bytes=0)
    except AloraServeError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)
    print(
        json.dumps(
            {
                "model": model.name,
                "architecture": type(model.module).__name__,
                "dtype": model.dtype,
                "device": device_name(model.device),
                "context_tokens": model.context_tokens,
                "adapters": [
                    {"name": adapter.name, "kind": adapter.kind, "rank": adapter.rank, "problem": adapter.problem}
                    for adapter in registry.list_adapters()
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
