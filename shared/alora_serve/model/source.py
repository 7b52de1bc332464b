"""From what a person writes for a model to a directory that holds it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from alora_serve.errors import ConfigError
from alora_serve.model.demo_model import MODEL_NAME, ensure_demo_model

DEMO = "demo"
_WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def model_name(source: str) -> str:
    """What people call a model given as ``demo`` (its real name), a directory (its last part) or a hub id (that)."""
    directory = Path(source).expanduser()
    if source == DEMO:
        return MODEL_NAME
    return directory.absolute().name if directory.is_dir() else source


def resolve_model(source: str) -> Path:
    """The directory of a model given as ``demo``, a directory, or a hub id (downloaded into the hub's cache).

    Raises:
        ConfigError: there is no such directory and no such model on the hub, or it cannot be reached.
    """
    if source == DEMO:
        return ensure_demo_model()
    directory = Path(source).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ConfigError(f"model={source!r}: the directory holds no config.json")
        return directory
    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED_FILES))
    except HFValidationError as error:
        raise ConfigError(
            f"model={source!r} is no directory here, and no hub id could be written so: check the path, or pass a "
            "hub id (organisation/name) or demo"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model={source!r} is no directory here, and the hub did not give it: {error}; "
            "pass a directory, a hub id, or demo"
        ) from error
