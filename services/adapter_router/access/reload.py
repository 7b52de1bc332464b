"""A file that is read again when it has changed; a version that does not parse leaves the one before in force."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

from alora_serve.config.file_version import file_version
from alora_serve.errors import ConfigError

ContentT = TypeVar("ContentT")

LOOK_SECONDS: Final = 1.0
"""How often the file is looked at, at most."""

_log = structlog.get_logger(__name__)


class Reloaded(Generic[ContentT]):
    """The content of a file, never older than a second or so. One event loop."""

    def __init__(self, path: Path, read: Callable[[Path], ContentT]) -> None:
        """Read it.

        Raises:
            ConfigError: it cannot be read or parsed.
        """
        self._path = path
        self._read = read
        self._version = file_version(path)
        self._content = read(path)
        self._looked_at = time.monotonic()

    @property
    def content(self) -> ContentT:
        """As it is now, or was when it last made sense."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            version = file_version(self._path)
            if version != self._version:
                self._version = version
                self._take()
        return self._content

    def _take(self) -> None:
        try:
            self._content = self._read(self._path)
        except ConfigError as error:
            _log.error("file not reloaded, what was read before stays in force", path=str(self._path), error=str(error))
        else:
            _log.info("file reloaded", path=str(self._path))
