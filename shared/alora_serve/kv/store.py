"""The tensor store as the rest of the project sees it: opaque values under 32-byte keys.

Who calls what: base prefill and base turns on a worker write (``put_many``), both read (``contains_many``,
``get_many``). Values are records (``kv/record.py``); a store neither knows nor checks what is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from typing_extensions import Buffer

StoreKey = NewType("StoreKey", bytes)
"""32 bytes naming one part of one block. A type of its own, so that raw byte strings are not passed by mistake."""

Sink = Callable[[int, memoryview], None]
"""Called with the index of a key in the request and its value. The view is valid only during the call: copy, do not
keep. An exception from the sink propagates to the caller of ``get_many``."""


@dataclass(frozen=True, slots=True)
class Put:
    """One value to store.

    Attributes:
        key: its name.
        value: its bytes; the store reads them before ``put_many`` returns and keeps no reference.
        evict_first: a partial tail: goes before any full block when space is short.
    """

    key: StoreKey
    value: Buffer
    evict_first: bool = False


class KVStore(Protocol):
    """A shared key-value store. Thread-safe; one instance a process.

    Errors, for every method: :class:`~alora_serve.errors.StoreUnavailableError` when the store cannot be reached,
    :class:`~alora_serve.errors.StoreTimeoutError` when ``timeout_seconds`` passed first, and
    :class:`~alora_serve.errors.StoreError` for anything else that the store itself reports. A key that is absent is
    never an error. No method retries.
    """

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        """Call ``sink(index, value)`` once for each key that is present, in any order, from any thread, never twice.

        Calls to the sink may run concurrently when the store reads over several connections, but none begins or still
        runs after this method has returned or raised: the sink's target may be in use by then. On an error, values
        already handed out stay handed out. Reading refreshes a key's recency.
        """

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        """Whether each key is present, in order. Moves no values and need not refresh recency."""

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        """Store all values; when it returns, another process can read them.

        A value is written whole or not at all; an existing value under the key is replaced. Raises
        :class:`~alora_serve.errors.StoreFullError` when there is no space even after eviction; values before the
        failing one may have been stored.
        """

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        """Remove the keys; absent ones are ignored."""

    def close(self) -> None:
        """Release connections, threads and files. Idempotent. Other methods raise ``StoreUnavailableError`` after."""
