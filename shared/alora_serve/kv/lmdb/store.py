"""``LmdbStore``: the embedded store, shared by the processes of one host and read in place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import lmdb

from alora_serve.kv.lmdb.environment import EnvironmentSlot
from alora_serve.kv.lmdb.files import remaining_seconds
from alora_serve.kv.lmdb.index import value_key
from alora_serve.kv.lmdb.writer import Job, Writer
from alora_serve.kv.store import Put, Sink, StoreKey


class LmdbStore:
    """A :class:`~alora_serve.kv.store.KVStore` in memory-mapped files.

    Opens its files at the first call, so it may be made before a fork but not used before one. Readers never wait for
    writers. A value is a view of the mapped page inside a read transaction that lasts one call of the sink. Recency of
    reads reaches the files with the next put, or after ``recency_seconds``.

    Args:
        root: directory that holds the store; created with mode 0700.
        budget_bytes: what all values together may occupy, shared by all processes and clamped to 3/4 of the file
            system's room. Give every process the same.
        recency_seconds: longest time that reads stay unknown to eviction.
    """

    def __init__(self, root: Path, *, budget_bytes: int, recency_seconds: float = 5.0) -> None:
        self._slot = EnvironmentSlot(root, budget_bytes)
        self._writer = Writer(self._slot, recency_seconds)

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`. Calls the sink in order, from the calling thread."""
        deadline = time.monotonic() + timeout_seconds
        found: list[StoreKey] = []
        try:
            with self._slot.lease(deadline) as opened:
                for index, key in enumerate(keys):
                    remaining_seconds(deadline)
                    with self._slot.translating(opened, deadline):
                        txn, value = _look_up(opened.env, key)
                    with txn:
                        if value is not None:
                            found.append(key)
                            with value:  # released afterwards: a kept view would be of pages that change
                                sink(index, value)
        finally:
            self._writer.touch(found)

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        deadline = time.monotonic() + timeout_seconds
        with (
            self._slot.lease(deadline) as opened,
            self._slot.translating(opened, deadline),
            opened.env.begin(buffers=True) as txn,
        ):
            return [txn.get(value_key(key)) is not None for key in keys]

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`. Of several puts under one key the last counts.

        May overrun the time by one transaction of at most 16 MiB, since the values are read where they are.
        """
        last = {put.key: put for put in puts}
        self._run(Job(tuple(last.values()), (), time.monotonic() + timeout_seconds))

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        self._run(Job((), tuple(keys), time.monotonic() + timeout_seconds))

    def close(self) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`. A read in progress ends first; the files close after it."""
        self._writer.close()
        self._slot.close()

    def _run(self, job: Job) -> None:
        if job.puts or job.deletes:
            self._writer.run(job)


def _look_up(env: lmdb.Environment, key: StoreKey) -> tuple[lmdb.Transaction[memoryview], memoryview | None]:
    """A read transaction, for the caller to end, and the value as long as it lasts."""
    txn = env.begin(buffers=True)
    try:
        return txn, txn.get(value_key(key))
    except BaseException:
        txn.abort()  # or the error's traceback would keep it, and with it the pages
        raise
