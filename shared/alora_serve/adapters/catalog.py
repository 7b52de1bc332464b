"""Which adapters lie in the roots: a scan by folder name, and for each adapter what is known of its files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from alora_serve.adapters.files import CONFIG_NAME, AdapterFiles, Signature, find_files
from alora_serve.errors import AdapterRefusedError, ConfigError
from alora_serve.types import AdapterDigest, AdapterInfo

_READ_ATTEMPTS = 3

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class CatalogEntry:
    """One adapter by name. Whoever calls a method holds ``lock``, which makes reading its files single-flight.

    Attributes:
        name: the folder's.
        directory: the folder.
        root: the root that it lies in, which its files may not leave.
        max_weights_bytes: larger weights files are refused.
        info: as listed; its ``problem`` says why the adapter was refused. Reading it needs no lock.
    """

    name: str
    directory: Path
    root: Path
    max_weights_bytes: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    info: AdapterInfo | None = None
    _signature: Signature | None = None

    @property
    def refused(self) -> tuple[str, Signature | None] | None:
        """Why, and with which files, if they were found; None while nothing is known against it."""
        return (self.info.problem, self._signature) if self.info is not None and self.info.problem else None

    def is_current(self) -> bool:
        """Whether ``info``, a refusal included, is about the files as they lie there now."""
        try:
            return self.info is not None and self._signature == self._find_files().signature()
        except (AdapterRefusedError, OSError):
            return False  # reading will say why

    def read(self, reader: Callable[[AdapterFiles], T]) -> T:
        """Run ``reader`` on files that stay the same meanwhile. A refusal is kept as ``info``, with its files.

        Raises:
            AdapterRefusedError: ``reader`` refused them, or they cannot be read or do not stay the same. Names it.
        """
        signature: Signature | None = None
        try:
            for _ in range(_READ_ATTEMPTS):
                files = self._find_files()
                signature = files.signature()
                result = reader(files)
                # A file overwritten in place while it is read can mix two versions, all shapes right.
                if files.signature() == signature:
                    self._signature = signature
                    return result
            raise AdapterRefusedError("its files keep changing while they are read")
        except (AdapterRefusedError, OSError) as error:
            problem = str(error) if isinstance(error, AdapterRefusedError) else f"its files cannot be read: {error}"
            self._signature, self.info = signature, refused_info(self.name, problem)
            raise self.refusal(problem) from error

    def read_definition(self) -> bytes | None:
        """What defines the adapter as an intrinsic, unchecked; None when nothing does.

        Raises:
            AdapterRefusedError: its files cannot be read now.
        """
        try:
            return self._find_files().read_definition()
        except (AdapterRefusedError, OSError) as error:
            raise self.refusal(f"its files cannot be read: {error}") from error

    def refusal(self, problem: str) -> AdapterRefusedError:
        """The error for a use of this adapter, with the ``problem`` of its listing."""
        return AdapterRefusedError(f"adapter {self.name!r} cannot be served: {problem}")

    def _find_files(self) -> AdapterFiles:
        return find_files(self.directory, root=self.root, max_weights_bytes=self.max_weights_bytes)


@dataclass(frozen=True, slots=True)
class Scan:
    """What the roots hold: directory and root by name, and listings of the directories that an earlier root hides."""

    found: dict[str, tuple[Path, Path]]
    hidden: tuple[AdapterInfo, ...]


def scan(roots: Sequence[Path]) -> Scan:
    """Find every direct subdirectory with an ``adapter_config.json``. Of two with one name, the first root's counts.

    Raises:
        ConfigError: a root is not a readable directory.
    """
    found: dict[str, tuple[Path, Path]] = {}
    hidden: list[AdapterInfo] = []
    for root in roots:
        for directory in _subdirectories(root):
            # A leading dot: the links and temporary folders of volume mounts and downloads.
            if directory.name.startswith(".") or not (directory / CONFIG_NAME).exists():
                continue
            if directory.name in found:
                winner = found[directory.name][0]
                hidden.append(refused_info(directory.name, f"{directory} is hidden by {winner}, of the same name"))
            else:
                found[directory.name] = (directory, root)
    return Scan(found, tuple(hidden))


def _subdirectories(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError as error:
        raise ConfigError(f"adapter root {root} cannot be listed: {error}") from error


def refused_info(name: str, problem: str) -> AdapterInfo:
    """The listing of an adapter of which nothing is known but why it cannot be served."""
    return AdapterInfo(
        name=name,
        digest=AdapterDigest(""),
        kind="",
        rank=0,
        target_modules=(),
        invocation_tokens=(),
        invocation_text="",
        size_bytes=0,
        resident=False,
        problem=problem,
    )
