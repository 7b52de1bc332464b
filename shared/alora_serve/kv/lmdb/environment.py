"""The one open LMDB environment of this process: opened when first needed, reopened when replaced, never a crash.

Why these choices:

* ``writemap=False``. For 700 KB values in a warm /dev/shm it writes 3.3-4.3 GB/s where a writable map writes 8-13, and
  reads the same 11-20 GB/s. A third of the write speed buys that a full file system is an error instead of SIGBUS and
  that a stray pointer cannot damage the store.
* ``sync=False``. It is a cache: what a power loss damages is set aside.
* One tree, no named databases: opening a named one can need the writer lock, which a stopped process may hold.

On disk: ``<root>/v1/{data,lock}.mdb``, the last damaged environment as ``<root>/v1.aside``, and ``<root>/open.lock``,
which serialises opening and setting aside among processes. Processes that share a root must share a PID namespace.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lmdb
import structlog

from alora_serve.errors import StoreError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.lmdb.files import (
    TruncatedError,
    file_identity,
    file_lock,
    refuse_foreign,
    refuse_truncated,
    remaining_seconds,
)

_log = structlog.get_logger(__name__)

_LAYOUT = "v1"
_MAP_PER_BUDGET = 4  # pages pinned by a stopped reader pile up outside the budget; this is how far they may
_SMALLEST_MAP_BYTES = 1 << 20
_CAPACITY_SHARE = 0.75  # of the file system's room; the rest is for copy-on-write and fragmentation
_MAX_READERS = 1024

_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.PanicError,
    lmdb.CursorFullError,
    lmdb.PageFullError,
    lmdb.BadTxnError,
    lmdb.ProblemError,
    struct.error,  # our own bookkeeping in the tree is not what we wrote
)
"""What is raised when the tree makes no sense."""


@dataclass(slots=True, eq=False)
class OpenEnvironment:
    """An open environment and who is using it.

    Attributes:
        data_file: path of the data file.
        identity: device and inode of the data file; another file at the same path is another environment.
        budget_bytes: what the values may occupy, already clamped to the file system.
        page_bytes: LMDB's page size.
        pid: the process that opened it.
        leases: operations in progress; guarded by the slot's lock.
        retired: to be closed by whoever ends the last lease.
    """

    env: lmdb.Environment
    data_file: Path
    identity: tuple[int, int]
    budget_bytes: int
    page_bytes: int
    pid: int
    leases: int = 0
    retired: bool = False


class EnvironmentSlot:
    """Hands out leases on the current environment and replaces it when it is damaged, deleted or outgrown.

    Thread-safe. An environment is closed only when nobody holds a lease, since closing unmaps what readers look at.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._requested_budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._current: OpenEnvironment | None = None
        self._draining: list[OpenEnvironment] = []
        self._closed = False

    @contextmanager
    def lease(self, deadline: float) -> Iterator[OpenEnvironment]:
        """The current environment, kept open until the block ends. Raises the store errors if it cannot be opened."""
        opened = self._acquire(deadline)
        try:
            yield opened
        finally:
            with self._changed:
                opened.leases -= 1
                self._close_if_unused(opened)

    @contextmanager
    def translating(self, opened: OpenEnvironment, deadline: float) -> Iterator[None]:
        """Turn LMDB's errors and the system's into ours.

        A damaged environment is set aside before ``StoreError`` leaves the block.
        """
        try:
            yield
        except _DAMAGE as error:
            self._set_aside(opened, deadline, error)
            raise StoreError(f"the LMDB store was damaged and has been set aside: {error}") from error
        except lmdb.MapResizedError as error:
            with self._changed:
                self._retire(opened)
            raise StoreError("another process with a larger budget outgrew this map; it is opened again") from error
        except lmdb.ReadersFullError as error:
            opened.env.reader_check()
            raise StoreError("all LMDB reader slots are taken") from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"LMDB: {error}") from error

    def close(self) -> None:
        """Refuse new leases and close the environment as soon as the last lease ends. Does not wait."""
        with self._changed:
            self._closed = True
            if self._current is not None:
                self._retire(self._current)

    # --- under self._changed ------------------------------------------------------------------------------------------

    def _usable(self) -> OpenEnvironment | None:
        if self._closed:
            raise StoreUnavailableError("the LMDB store is closed")
        current = self._current
        if current is None:
            return None
        if current.pid != os.getpid():
            raise StoreUnavailableError("the LMDB store was opened before a fork; open one in each process")
        if file_identity(current.data_file) == current.identity:
            return current
        self._retire(current)
        return None

    def _retire(self, opened: OpenEnvironment) -> None:
        if opened is self._current:
            self._current = None
        if not opened.retired:
            opened.retired = True
            self._draining.append(opened)
        self._close_if_unused(opened)

    def _close_if_unused(self, opened: OpenEnvironment) -> None:
        if opened.retired and opened.leases == 0 and opened in self._draining:
            self._draining.remove(opened)
            opened.env.close()
            self._changed.notify_all()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _acquire(self, deadline: float) -> OpenEnvironment:
        if not self._changed.acquire(timeout=remaining_seconds(deadline)):
            raise StoreTimeoutError("the LMDB store is still being opened")
        try:
            current = self._usable()
            while current is None:
                # LMDB must not open a file that this process still has open, and while we wait for its closing another
                # thread may have opened the next one.
                if self._on_disk_identity() in [old.identity for old in self._draining]:
                    self._changed.wait(remaining_seconds(deadline))
                    current = self._usable()
                else:
                    current = self._current = self._open(deadline)
            current.leases += 1
            return current
        finally:
            self._changed.release()

    def _on_disk_identity(self) -> tuple[int, int] | None:
        return file_identity(self._root / _LAYOUT / "data.mdb")

    def _open(self, deadline: float) -> OpenEnvironment:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_foreign(self._root)
            with file_lock(self._root / "open.lock", deadline):
                try:
                    return self._open_files()
                except (*_DAMAGE, TruncatedError, FileExistsError) as error:
                    self._rename_aside(error)
                    return self._open_files()
        except (lmdb.Error, TruncatedError, OSError) as error:
            raise StoreUnavailableError(f"cannot open the LMDB store in {self._root}: {error}") from error

    def _open_files(self) -> OpenEnvironment:
        directory = self._root / _LAYOUT
        directory.mkdir(mode=0o700, exist_ok=True)
        data_file = directory / "data.mdb"
        env = lmdb.open(
            str(directory),
            map_size=0,  # whatever the largest budget so far asked for; the file remembers
            mode=0o700,
            sync=False,
            metasync=False,
            writemap=False,
            meminit=False,
            readahead=False,
            max_readers=_MAX_READERS,
            max_spare_txns=1,
            lib_version=0,
        )
        try:
            map_bytes = max(_MAP_PER_BUDGET * self._requested_budget_bytes, _SMALLEST_MAP_BYTES)
            if env.info()["map_size"] < map_bytes:
                env.set_mapsize(map_bytes)
            page_bytes = env.stat()["psize"]
            refuse_truncated(env, data_file, page_bytes)
            env.reader_check()
            status = data_file.stat()
            return OpenEnvironment(
                env=env,
                data_file=data_file,
                identity=(status.st_dev, status.st_ino),
                budget_bytes=self._clamped_budget_bytes(data_file),
                page_bytes=page_bytes,
                pid=os.getpid(),
            )
        except BaseException:
            env.close()
            raise

    def _clamped_budget_bytes(self, data_file: Path) -> int:
        if self._room_bytes(data_file) < self._requested_budget_bytes:
            shutil.rmtree(self._root / f"{_LAYOUT}.aside", ignore_errors=True)
        room_bytes = self._room_bytes(data_file)
        if room_bytes < self._requested_budget_bytes:
            _log.warning(
                "lmdb_budget_clamped", root=str(self._root), asked=self._requested_budget_bytes, given=room_bytes
            )
        return min(room_bytes, self._requested_budget_bytes)

    def _room_bytes(self, data_file: Path) -> int:
        filesystem = os.statvfs(self._root)
        own_bytes = data_file.stat().st_blocks * 512
        return int((filesystem.f_bavail * filesystem.f_frsize + own_bytes) * _CAPACITY_SHARE)

    # --- setting aside ------------------------------------------------------------------------------------------------

    def _set_aside(self, opened: OpenEnvironment, deadline: float, reason: Exception) -> None:
        with self._changed:
            self._retire(opened)
        try:
            with file_lock(self._root / "open.lock", deadline):
                # Another process may have been first, and what is there now is its fresh environment.
                if self._on_disk_identity() == opened.identity:
                    self._rename_aside(reason)
        except OSError as error:
            raise StoreError(f"the LMDB store is damaged ({reason}) and cannot be set aside: {error}") from error

    def _rename_aside(self, reason: Exception) -> None:
        directory, aside = self._root / _LAYOUT, self._root / f"{_LAYOUT}.aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        directory.rename(aside)
        _log.error("lmdb_set_aside", directory=str(directory), aside=str(aside), reason=str(reason))
