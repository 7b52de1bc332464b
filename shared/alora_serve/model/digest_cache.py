"""Keeps digests of weight files, so that a restart need not read gigabytes only to name them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import structlog

from alora_serve.model.digests import weights_digest

_log = structlog.get_logger(__name__)
_SETTLED_NS: Final = 2_000_000_000
"""Files that changed so recently may change again within one tick of the file system's clock, unseen."""


def kept_weights_digest(directory: Path, cache: Path) -> bytes:
    """:func:`weights_digest` of ``directory``, from ``cache`` while no weight file has changed.

    A file is the same while path, size, inode, and the times of its content and of its inode are; the last moves with
    every write and cannot be set. A cache that cannot be read or written is none.

    Raises:
        ModelUnsupportedError: no safetensors file.
    """
    entry = cache / f"{hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()}.json"
    files = _facts(directory)
    if files and (kept := _read(entry, files)):
        return kept
    digest = weights_digest(directory)
    newest = max(max(times) for *_, times in files)
    if _facts(directory) == files and time.time_ns() - newest > _SETTLED_NS:
        _write(entry, {"files": files, "digest": digest.hex()})
    return digest


def _facts(directory: Path) -> list[list[Any]]:
    """Of each weight file: name, size, inode, and its two times in nanoseconds."""
    found = sorted(directory.glob("*.safetensors"))
    stats = [(file.name, file.stat()) for file in found]
    return [[name, s.st_size, s.st_ino, [s.st_mtime_ns, s.st_ctime_ns]] for name, s in stats]


def _read(entry: Path, files: list[list[Any]]) -> bytes | None:
    try:
        kept = json.loads(entry.read_bytes())
        digest = bytes.fromhex(kept["digest"])
        return digest if kept["files"] == files and len(digest) == hashlib.sha256().digest_size else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("kept_digest_unusable", file=str(entry), error=repr(error))
        return None


def _write(entry: Path, kept: dict[str, Any]) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, prefix=".", delete=False) as part:
            json.dump(kept, part)
        Path(part.name).replace(entry)
    except OSError as error:
        _log.info("digest_not_kept", file=str(entry), error=repr(error))
