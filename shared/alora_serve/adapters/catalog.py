"""Which adapters lie in the roots: a scan by folder name, and for each adapter what is known of its files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import structlog

from alora_serve.adapters.files import CONFIG_NAME, AdapterFiles, Signature, find_files
from alora_serve.errors import AdapterRefusedError, ConfigError
from alora_serve.intrinsics.excerpts import sendable
from alora_serve.types import AdapterDigest, AdapterInfo

_READ_ATTEMPTS = 3
_PROBLEM_CHARACTERS: Final = 1000

_log = structlog.get_logger(__name__)

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
    _judged: bool = False

    @property
    def refused(self) -> tuple[str, Signature | None] | None:
        """Why, and with which files, if they were found; None while nothing is known against it."""
        return (self.info.problem, self._signature) if self.info is not None and self.info.problem else None

    def is_current(self) -> bool:
        """Whether ``info``, a refusal included, is about the files as they lie there now."""
        try:
            return self.info is not None and self._signature == self._find_files().signature()
        except Exception:  # noqa: BLE001 - reading will say why
            return False

    def is_gone(self) -> bool:
        """Whether there is no such folder. Where that cannot be known now, there is: reading will say why."""
        try:
            return not _exists(self.directory)
        except OSError:
            return False

    def is_settled(self) -> bool:
        """Whether reading the files again would say what ``info`` does: unless it is that reading them went wrong."""
        return self._judged and self.is_current()

    def read(self, reader: Callable[[AdapterFiles], T]) -> T:
        """Run ``reader`` on files that stay the same meanwhile. A refusal is kept as ``info``, with its files.

        Raises:
            AdapterRefusedError: ``reader`` refused them or broke over them, or they cannot be read or do not stay the
                same. Names the adapter.
            MemoryError: there was too little for them.
        """
        signature: Signature | None = None
        try:
            for _ in range(_READ_ATTEMPTS):
                files = self._find_files()
                signature = files.signature()
                result = reader(files)
                # A file overwritten in place while it is read can mix two versions, all shapes right.
                if files.signature() == signature:
                    self._signature, self._judged = signature, True
                    return result
            raise AdapterRefusedError("its files keep changing while they are read")
        except MemoryError:
            raise  # of the process, and no fault of the files
        except Exception as error:  # whatever it is: one adapter may cost no other its place, now or at the next start
            problem = self._problem(error)
            self._signature, self.info = signature, refused_info(self.name, problem)
            self._judged = isinstance(error, AdapterRefusedError)  # by what the files hold
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
        return AdapterRefusedError(f"adapter {self.name!r} cannot be served: {_listed(problem)}")

    def _problem(self, error: Exception) -> str:
        if isinstance(error, AdapterRefusedError):
            return str(error)
        if isinstance(error, OSError):
            return f"its files cannot be read: {error}"
        problem = f"reading its files ended in a fault of ours: {type(error).__name__}: {error}"
        if self.info is None or self.info.problem != _listed(problem):  # it is read again at every scan
            _log.error("adapter not read", adapter=self.name, exc_info=error)
        return problem

    def _find_files(self) -> AdapterFiles:
        return find_files(self.directory, root=self.root, max_weights_bytes=self.max_weights_bytes)


@dataclass(frozen=True, slots=True)
class Scan:
    """What the roots hold.

    Attributes:
        found: directory and root by name.
        refused: listings of those that go by no name: an earlier root has one of it, or no request can say it.
        unknown: what was no adapter before and cannot be looked into, such as ``lost+found``, and why.
    """

    found: Mapping[str, tuple[Path, Path]]
    refused: tuple[AdapterInfo, ...]
    unknown: Mapping[Path, str]


def scan(roots: Sequence[Path], known: Collection[Path] = ()) -> Scan:
    """Find every direct subdirectory with an ``adapter_config.json``. Of two with one name, the first root's counts.

    One of the ``known`` is found also where that file cannot be looked at: a moment's error takes no adapter's place.

    Raises:
        ConfigError: a root is not a readable directory.
    """
    found: dict[str, tuple[Path, Path]] = {}
    refused: list[AdapterInfo] = []
    unknown: dict[Path, str] = {}
    for root in roots:
        for directory in _listed_in(root):
            name = directory.name
            try:
                if not _exists(directory / CONFIG_NAME):
                    continue
            except OSError as error:
                if directory not in known:
                    unknown[directory] = str(error)
                    continue
            if name != sendable(name):
                refused.append(refused_info(name, "the folder's name is not UTF-8, so no request has it; rename it"))
            elif name in found:
                refused.append(refused_info(name, f"{directory} is hidden by {found[name][0]}, of the same name"))
            else:
                found[name] = (directory, root)
    return Scan(found, tuple(refused), unknown)


def _listed_in(root: Path) -> list[Path]:
    try:
        # A leading dot: the links and temporary folders of volume mounts and downloads.
        return sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"adapter root {root} cannot be listed: {error}") from error


def _exists(path: Path) -> bool:
    """Raises OSError where that cannot be known."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def refused_info(name: str, problem: str) -> AdapterInfo:
    """The listing of an adapter of which nothing is known but why it cannot be served."""
    return AdapterInfo(
        name=sendable(name),
        digest=AdapterDigest(""),
        kind="",
        rank=0,
        target_modules=(),
        invocation_tokens=(),
        invocation_text="",
        size_bytes=0,
        resident=False,
        problem=_listed(problem),
    )


def _listed(problem: str) -> str:
    """As routers can be told: a file can hold what protobuf has no characters for, and a name of megabytes."""
    return sendable(problem if len(problem) <= _PROBLEM_CHARACTERS else f"{problem[:_PROBLEM_CHARACTERS]}…")
