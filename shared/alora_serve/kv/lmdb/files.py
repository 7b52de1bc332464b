"""Files of the LMDB store: where they lie, whose they are, whether they are whole, and one lock over changing them."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from alora_serve.config import default_cache_directory
from alora_serve.errors import StoreTimeoutError, StoreUnavailableError

_POLL_SECONDS = 0.01
_RECHECK_SECONDS = 0.05


class TruncatedError(Exception):
    """The data file ends before its last page."""


def default_location() -> Path:
    """Where the store lives unless told otherwise: shared memory where there is some, else :func:`disk_location`."""
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir() and os.access(shared_memory, os.W_OK | os.X_OK):
        return shared_memory / f"alora-serve-{os.getuid()}"
    return disk_location()


def disk_location() -> Path:
    """Where the store lives on disk unless told otherwise: in the cache directory."""
    return default_cache_directory() / "store"


def remaining_seconds(deadline: float) -> float:
    """Seconds until ``deadline`` (``time.monotonic()``); raises ``StoreTimeoutError`` when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise StoreTimeoutError("the LMDB store did not answer in the time given")
    return left


def file_identity(data_file: Path) -> tuple[int, int] | None:
    """Device and inode, or None where there is no file: another file at the same path is another environment."""
    try:
        status = data_file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def refuse_truncated(env: lmdb.Environment, data_file: Path, page_bytes: int) -> None:
    """Reading a page past the end of the file is SIGBUS, so look before anybody reads.

    A file may be short for the moment between a commit and the extension that follows it (see ``extend_to_last_page``).
    """
    if _is_truncated(env, data_file, page_bytes):
        time.sleep(_RECHECK_SECONDS)
        if _is_truncated(env, data_file, page_bytes):
            raise TruncatedError(f"{data_file} ends before its last page")


def _is_truncated(env: lmdb.Environment, data_file: Path, page_bytes: int) -> bool:
    last_page: int = env.info()["last_pgno"]  # before the size: the file may only grow in between
    return data_file.stat().st_size < (last_page + 1) * page_bytes


def extend_to_last_page(env: lmdb.Environment, data_file: Path, page_bytes: int) -> None:
    """After a commit: make the file as long as its page count says.

    LMDB does not write pages that a transaction allocated at the end and gave up again, so a healthy file can end early
    and would look truncated. Allocating never shortens the file, however many writers are at it.
    """
    if sys.platform == "darwin":  # no posix_fallocate; a false alarm there costs a cache, not an answer
        return
    if _is_truncated(env, data_file, page_bytes):
        last_page = env.info()["last_pgno"]
        with data_file.open("r+b") as file:
            os.posix_fallocate(file.fileno(), last_page * page_bytes, page_bytes)


def refuse_foreign(root: Path) -> None:
    """In a directory that anybody may write to, a root that somebody else made for us is a trap."""
    parent = root.parent.stat()
    if parent.st_mode & stat.S_IWOTH and root.lstat().st_uid != os.getuid():
        raise StoreUnavailableError(f"{root} belongs to another user")


@contextmanager
def file_lock(path: Path, deadline: float) -> Iterator[None]:
    """An exclusive lock among processes, given up at the deadline: its holder may be stopped."""
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(min(_POLL_SECONDS, remaining_seconds(deadline)))
        yield
