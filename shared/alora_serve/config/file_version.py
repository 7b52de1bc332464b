"""Tells whether a file is still the one that was read."""

from __future__ import annotations

from pathlib import Path

FileVersion = tuple[int, int, int]
"""Inode, time and size: a mounted secret of Kubernetes is replaced by turning a link, which keeps times as they are."""


def file_version(path: Path | str) -> FileVersion | None:
    """As it is now; None where there is no file, or none is named."""
    if not path:  # an empty path would be the working directory
        return None
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
