"""An adapter's files on disk: found without leaving the adapter root, read once, and named by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from typing_extensions import Buffer

from alora_serve.adapters.config import parse_adapter_config
from alora_serve.errors import AdapterRefusedError
from alora_serve.intrinsics import FILE_NAME, MAX_DEFINITION_BYTES
from alora_serve.types import AdapterDigest

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"

MAX_CONFIG_BYTES = 1 << 20
DEFAULT_MAX_WEIGHTS_BYTES = 4 << 30
"""4 GiB: well above rank 256 on every linear of an 8B model; a bound against pointing a root at whole models."""

_CHUNK_BYTES = 1 << 20

Signature = tuple[int, ...]
"""Changes when a file is replaced, rewritten or new: inode, size and modification time of each."""


@dataclass(frozen=True, slots=True)
class RealFile:
    """A file inside a root, found with all links followed.

    What comes to lie in its place is not followed: who may write there could turn it into a link, a pipe or more bytes
    after it was looked at.

    Attributes:
        root: resolved.
        path: resolved, inside ``root``.
        max_bytes: a larger file is refused.
    """

    root: Path
    path: Path
    max_bytes: int

    def open(self) -> BinaryIO:
        """The file, to be closed. It was looked at as it was opened: its name stands for nothing any more.

        Raises:
            AdapterRefusedError: it is not a regular file, or too large.
            OSError: it cannot be opened, or a link lies in its way.
        """
        descriptor = self._descriptor()
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterRefusedError(f"{self.path.name} is not a regular file")
            if status.st_size > self.max_bytes:
                raise AdapterRefusedError(f"{self.path.name} has {status.st_size} bytes, more than {self.max_bytes}")
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise

    def read(self) -> bytes:
        """What it held when it was opened, and no more than ``max_bytes``. Raises as :meth:`open`."""
        with self.open() as file:
            return file.read(min(os.fstat(file.fileno()).st_size, self.max_bytes))

    def _descriptor(self) -> int:
        *folders, name = self.path.relative_to(self.root).parts
        at = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for folder in folders:
                inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = inner
            # A pipe would wait for a writer.
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        finally:
            os.close(at)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's config and weights, and what makes it an intrinsic."""

    config: RealFile
    weights: RealFile
    definition: RealFile | None = None

    def signature(self) -> Signature:
        """What the files look like now, without reading them. Raises OSError when one is gone."""
        found = [file.path.stat() for file in (self.config, self.weights, self.definition) if file is not None]
        return tuple(part for now in found for part in (now.st_ino, now.st_size, now.st_mtime_ns))

    def read_definition(self) -> bytes | None:
        """The bytes of the ``io.yaml``; None without one."""
        return None if self.definition is None else self.definition.read()


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """A file in order, a megabyte at a time."""
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def find_files(directory: Path, *, root: Path, max_weights_bytes: int = DEFAULT_MAX_WEIGHTS_BYTES) -> AdapterFiles:
    """Locate the files of the adapter in ``directory``, which lies in ``root``.

    Links are followed as long as they end inside ``root`` (a Kubernetes volume links each file to ``..data/``).

    Raises:
        AdapterRefusedError: a file is missing, too large, not a regular file, unreadable or outside ``root``, or the
            weights are pickled only. What is wrong with the config is then said as well, to be repaired in one go.
    """
    config = _real_file(directory / CONFIG_NAME, root, MAX_CONFIG_BYTES)
    definition = directory / FILE_NAME
    try:
        return AdapterFiles(
            config,
            _weights_file(directory, root, max_weights_bytes),
            _real_file(definition, root, MAX_DEFINITION_BYTES) if os.path.lexists(definition) else None,
        )
    except AdapterRefusedError as error:
        try:
            parse_adapter_config(config.read())
        except AdapterRefusedError as another:
            raise AdapterRefusedError(f"{another}; {error}") from error
        raise


def _weights_file(directory: Path, root: Path, max_bytes: int) -> RealFile:
    weights = directory / WEIGHTS_NAME
    if not weights.exists() and (directory / PICKLED_WEIGHTS_NAME).exists():
        raise AdapterRefusedError(
            f"{PICKLED_WEIGHTS_NAME} is a pickle and is never read; save the adapter again with safetensors, as "
            f"{WEIGHTS_NAME}"
        )
    return _real_file(weights, root, max_bytes)


def _real_file(path: Path, root: Path, max_bytes: int) -> RealFile:
    try:
        found = RealFile(root.resolve(), path.resolve(strict=True), max_bytes)
        if not found.path.is_relative_to(found.root):
            raise AdapterRefusedError(f"{path.name} leads out of the adapter root to {found.path}")
        found.open().close()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise AdapterRefusedError(f"cannot read {path.name}: {error}") from error
    return found


def digest_of(config: bytes, weights: Iterable[Buffer]) -> AdapterDigest:
    """SHA-256 over the length of the canonical config, that config, and the weights file.

    Canonical is JSON with sorted keys and no spaces, so that formatting a config anew does not make another adapter.
    ``config`` must be JSON.
    """
    canonical = json.dumps(json.loads(config), sort_keys=True, separators=(",", ":")).encode()
    hasher = hashlib.sha256()
    hasher.update(len(canonical).to_bytes(8, "little") + canonical)
    for chunk in weights:
        hasher.update(chunk)
    return AdapterDigest(hasher.hexdigest())
