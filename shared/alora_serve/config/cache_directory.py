"""Where what can be made again is kept: the converted demo model, and the store where there is no shared memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path

CACHE_DIRECTORY_VARIABLE: Final = "ALORA_CACHE_DIR"
"""Environment variable that names the cache directory; without it, the platform's user cache directory is used."""


def default_cache_directory() -> Path:
    """The directory named by ``ALORA_CACHE_DIR``, or this platform's user cache directory for alora-serve. Absolute."""
    named = os.environ.get(CACHE_DIRECTORY_VARIABLE)
    return Path(named).expanduser().absolute() if named else user_cache_path("alora-serve")
