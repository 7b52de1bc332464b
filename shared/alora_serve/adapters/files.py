"""An adapter's files on disk: found without leaving the adapter root, read once, and named by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
class AdapterFiles:
    """Real paths (symbolic links followed) of an adapter's config and weights, and of what makes it an intrinsic."""

    config: Path
    weights: Path
    definition: Path | None = None

    def signature(self) -> Signature:
        """What the files look like now, without reading them. Raises OSError when one is gone."""
        stats = [path.stat() for path in (self.config, self.weights, self.definition) if path is not None]
        return tuple(part for stat in stats for part in (stat.st_ino, stat.st_size, stat.st_mtime_ns))

    def read_definition(self) -> bytes | None:
        """The bytes of the ``io.yaml``, one more than are allowed at most; None without one."""
        if self.definition is None:
            return None
        with self.definition.open("rb") as file:
            return file.read(MAX_DEFINITION_BYTES + 1)

    def weights_chunks(self) -> Iterator[bytes]:
        """The weights file in order, a megabyte at a time."""
        with self.weights.open("rb") as file:
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
            parse_adapter_config(config.read_bytes())
        except AdapterRefusedError as another:
            raise AdapterRefusedError(f"{another}; {error}") from error
        raise


def _weights_file(directory: Path, root: Path, max_bytes: int) -> Path:
    weights = directory / WEIGHTS_NAME
    if not weights.exists() and (directory / PICKLED_WEIGHTS_NAME).exists():
        raise AdapterRefusedError(
            f"{PICKLED_WEIGHTS_NAME} is a pickle and is never read; save the adapter again with safetensors, as "
            f"{WEIGHTS_NAME}"
        )
    return _real_file(weights, root, max_bytes)


def _real_file(path: Path, root: Path, max_bytes: int) -> Path:
    try:
        real = path.resolve(strict=True)
        inside, regular, size = real.is_relative_to(root.resolve()), real.is_file(), real.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise AdapterRefusedError(f"cannot read {path.name}: {error}") from error
    if not inside:
        raise AdapterRefusedError(f"{path.name} leads out of the adapter root to {real}")
    if not regular:
        raise AdapterRefusedError(f"{path.name} is not a regular file")
    if size > max_bytes:
        raise AdapterRefusedError(f"{path.name} has {size} bytes, more than {max_bytes}")
    return real


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
