"""The one thread of this process that writes to LMDB, so that waiting for the writer lock never holds up serving.

Another process that is stopped inside a write transaction keeps the lock for as long as it is stopped, and a thread
that waits for it cannot be interrupted. So callers hand a job to this thread and wait for it only until their deadline;
a job whose caller has left is taken off the queue. The queue thus never holds more jobs than there are callers waiting.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice

import lmdb
import structlog

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.lmdb.environment import EnvironmentSlot, OpenEnvironment
from alora_serve.kv.lmdb.files import extend_to_last_page
from alora_serve.kv.lmdb.index import WriteIndex
from alora_serve.kv.store import Put, StoreKey

_log = structlog.get_logger(__name__)

_FULL = (lmdb.MapFullError, lmdb.DiskError, lmdb.TxnFullError)
_TRANSACTION_BYTES = 16 << 20  # dirty pages live in this process's memory until the commit
_BUDGET_PER_TRANSACTION = 8
_MOST_TOUCHES_PER_TRANSACTION = 4096
_MOST_PENDING_TOUCHES = 65536
_CLOSE_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Job:
    """One ``put_many`` or ``delete_many``.

    Attributes:
        puts: values to store, one a key.
        deletes: keys to remove.
        deadline: ``time.monotonic()`` at which the caller leaves.
        highest_stamp: recency of the first key; the others follow downwards. Reserved with the first transaction.
        in_use: the thread is inside a transaction and reads the caller's buffers.
        abandoned: the caller has left.
        done: finished, with ``error`` if it failed.
    """

    puts: Sequence[Put]
    deletes: Sequence[StoreKey]
    deadline: float
    highest_stamp: int | None = None
    in_use: bool = False
    abandoned: bool = False
    done: bool = False
    error: BaseException | None = None
    keys: frozenset[StoreKey] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = frozenset(put.key for put in self.puts)


class Writer:
    """Runs jobs one after the other and, with them or every ``recency_seconds``, the recency that readers reported."""

    def __init__(self, slot: EnvironmentSlot, recency_seconds: float) -> None:
        self._slot = slot
        self._recency_seconds = recency_seconds
        self._state = threading.Condition()
        self._queue: deque[Job] = deque()
        self._touched: dict[StoreKey, None] = {}
        self._touch_due = 0.0
        self._closing = False
        self._thread: threading.Thread | None = None

    def run(self, job: Job) -> None:
        """Do the job and return, or raise what it raised, or ``StoreTimeoutError`` at its deadline.

        May overrun the deadline by one transaction: while it is being written the caller's buffers are being read.
        """
        with self._state:
            self._start()
            self._queue.append(job)
            self._state.notify_all()
            while not job.done:
                left = job.deadline - time.monotonic()
                if left > 0 or job.in_use:
                    self._state.wait(None if job.in_use else left)
                    continue
                job.abandoned = True
                if job in self._queue:
                    self._queue.remove(job)
                raise StoreTimeoutError("the LMDB writer did not get its turn in the time given")
        if job.error is not None:
            raise job.error

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """Note that the keys were read, the first being worth keeping longest. Never waits for a transaction."""
        with self._state:
            if not keys or self._closing:
                return
            with suppress(StoreUnavailableError):  # recency waits for the thread of the next job
                self._start()
            if not self._touched:
                self._touch_due = time.monotonic() + self._recency_seconds
                self._state.notify_all()
            for key in keys[: _MOST_PENDING_TOUCHES - len(self._touched)]:
                self._touched[key] = None

    def close(self) -> None:
        """Fail waiting jobs and end the thread; one that waits for the writer lock ends when it gets it."""
        with self._state:
            self._closing = True
            for job in self._queue:
                job.done, job.error = True, StoreUnavailableError("the LMDB store is closed")
            self._queue.clear()
            self._state.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._closing:
            raise StoreUnavailableError("the LMDB store is closed")
        if self._thread is None:
            thread = threading.Thread(target=self._loop, name="lmdb-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # there is a limit of threads, now; the next job tries again
                raise StoreUnavailableError(f"the LMDB writer's thread cannot be started: {error}") from error
            self._thread = thread

    def _loop(self) -> None:
        while self._step():  # a step of its own, so that no name keeps the last job's values while waiting
            pass

    def _step(self) -> bool:
        with self._state:
            while not self._queue and not self._closing and not self._touches_due():
                self._state.wait(self._touch_due - time.monotonic() if self._touched else None)
            if self._closing:
                return False
            job = self._queue.popleft() if self._queue else Job((), (), time.monotonic() + self._recency_seconds)
        error: BaseException | None = None
        try:
            self._serve(job)
        except BaseException as caught:  # noqa: BLE001 - handed to the caller; this thread must outlive it
            error = caught
            if not job.keys and not job.deletes and not isinstance(caught, StoreError):
                _log.exception("lmdb_recency_failed")
        with self._state:
            job.done, job.in_use, job.error = True, False, error
            self._state.notify_all()
        return True

    def _touches_due(self) -> bool:
        return bool(self._touched) and time.monotonic() >= self._touch_due

    def _serve(self, job: Job) -> None:
        with self._slot.lease(job.deadline) as opened, self._slot.translating(opened, job.deadline):
            for batch in _batches(job.puts, min(_TRANSACTION_BYTES, opened.budget_bytes // _BUDGET_PER_TRANSACTION)):
                try:
                    self._write(opened, job, batch)
                except _FULL:
                    self._write_after_making_room(opened, job, batch)

    def _write_after_making_room(self, opened: OpenEnvironment, job: Job, batch: Sequence[tuple[int, Put]]) -> None:
        """Evict once and try once more, but never below half the budget.

        While a stopped reader pins every page, evicting gains nothing, and put after put would empty the store.
        """
        try:
            with self._transaction(opened, job) as txn:
                index = WriteIndex(txn, opened.page_bytes)
                wanted_bytes = sum(index.cost_bytes(memoryview(put.value).nbytes) for _, put in batch)
                index.evict(min(wanted_bytes, index.used_bytes - opened.budget_bytes // 2), job.keys)
                index.save()
            with self._transaction(opened, job) as txn:  # what one transaction frees, the next but one may use
                WriteIndex(txn, opened.page_bytes).save()
            self._write(opened, job, batch)
        except _FULL as error:
            raise StoreFullError(f"the LMDB store is full: {error}") from error

    def _write(self, opened: OpenEnvironment, job: Job, batch: Sequence[tuple[int, Put]]) -> None:
        with self._transaction(opened, job) as txn:
            index = WriteIndex(txn, opened.page_bytes)
            index.touch(self._take_touches())
            index.delete(job.deletes)
            if job.highest_stamp is None:
                job.highest_stamp = index.reserve_stamps(len(job.puts))
            for offset, put in batch:
                index.put(
                    put.key,
                    put.value,
                    evict_first=put.evict_first,
                    stamp=job.highest_stamp - offset,
                    budget_bytes=opened.budget_bytes,
                    protected=job.keys,
                )
            index.save()
        try:
            extend_to_last_page(opened.env, opened.data_file, opened.page_bytes)
        except OSError as error:  # deleted, set aside or no room: the values are committed all the same
            _log.warning("lmdb_not_extended", file=str(opened.data_file), error=str(error))

    @contextmanager
    def _transaction(self, opened: OpenEnvironment, job: Job) -> Iterator[lmdb.Transaction[bytes]]:
        """A write transaction. The wait for the lock comes first, and the caller may leave until it is over.

        Readers left by killed processes are cleared each time: it takes microseconds, and the pages they pin would
        otherwise make the file grow to the whole map, which it never gives back.
        """
        opened.env.reader_check()
        with opened.env.begin(write=True) as txn:
            with self._state:
                if job.abandoned or time.monotonic() >= job.deadline:
                    raise StoreTimeoutError("the LMDB writer lock was not free in the time given")
                job.in_use = True
            yield txn
        with self._state:
            job.in_use = False
            self._state.notify_all()

    def _take_touches(self) -> list[StoreKey]:
        with self._state:
            keys = list(islice(self._touched, _MOST_TOUCHES_PER_TRANSACTION))
            for key in keys:
                del self._touched[key]
            return keys


def _batches(puts: Sequence[Put], most_bytes: int) -> Iterator[list[tuple[int, Put]]]:
    """Split into transactions of at most ``most_bytes`` (at least one value each); without puts, one empty one."""
    batch: list[tuple[int, Put]] = []
    batch_bytes = 0
    for offset, put in enumerate(puts):
        size = memoryview(put.value).nbytes
        if batch and batch_bytes + size > most_bytes:
            yield batch
            batch, batch_bytes = [], 0
        batch.append((offset, put))
        batch_bytes += size
    if batch or not puts:
        yield batch
