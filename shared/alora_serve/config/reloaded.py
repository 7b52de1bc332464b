"""Files that are read again when they have changed; what makes no sense leaves what was read before in force."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

from alora_serve.config.file_version import file_version
from alora_serve.errors import ConfigError

ContentT = TypeVar("ContentT")

PAUSES_SECONDS: Final = (1.0, 60.0)
"""What made no sense is read again unchanged, since access to it may have been mended: after the first of these, which
doubles up to the second, as whoever asks for the content waits while it is read."""

_log = structlog.get_logger(__name__)


class Reloaded(Generic[ContentT]):
    """What some files say together. Thread-safe."""

    def __init__(
        self,
        files: Sequence[Path | str],
        read: Callable[[], ContentT],
        *,
        look_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read them.

        Args:
            files: looked at for changes; one that is not there is one that changes when it comes.
            read: what they say; raises ConfigError where that makes no sense.
            look_seconds: they are looked at no more often.
            clock: tells the seconds.

        Raises:
            ConfigError: they cannot be read, or make no sense.
        """
        self._files = tuple(files)
        self._read = read
        self._look_seconds = look_seconds
        self._clock = clock
        self._lock = threading.Lock()
        # Before reading: what changes meanwhile is read again.
        self._version = self._refused = self._now()
        self._pause_seconds, self._again_at = 0.0, 0.0
        self._content = read()
        self._looked_at = clock()

    @property
    def content(self) -> ContentT:
        """As it is now, or was when it last made sense."""
        with self._lock:
            now = self._clock()
            if now - self._looked_at >= self._look_seconds:
                self._looked_at = now
                version = self._now()
                if version != self._version and (version != self._refused or now >= self._again_at):
                    self._take(version)
            return self._content

    def _take(self, version: tuple[object, ...]) -> None:
        names = ", ".join(str(file) for file in self._files)
        try:
            self._content = self._read()
        except Exception as error:  # noqa: BLE001 - else every call that asks for the content would fail
            first, longest = PAUSES_SECONDS
            self._pause_seconds = min(2 * self._pause_seconds, longest) if version == self._refused else first
            self._again_at = self._clock() + self._pause_seconds
            if version != self._refused:  # tried again and again, complained about once
                # What no reader foresaw may quote the file, and keys in it.
                told = str(error) if isinstance(error, ConfigError) else type(error).__name__
                _log.error("not reloaded, what was read before stays in force", files=names, error=told)
            self._refused = version
        else:
            self._version = version
            _log.info("reloaded", files=names)

    def _now(self) -> tuple[object, ...]:
        return tuple(map(file_version, self._files))
