"""The adapters in memory: leases on them, a byte budget, and least-recently-used eviction of those without a lease."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.types import AdapterDigest

_Key = tuple[str, AdapterDigest]

AdapterEventKind = Literal["hit", "load", "refuse", "evict", "drop"]


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """What happened to an adapter, for metrics and logs.

    Attributes:
        kind: ``hit`` (leased, was in memory), ``load`` (read from disk), ``refuse`` (was found unfit to be served,
            for another problem or with other files than before), ``evict`` (left memory to make room), ``drop``
            (left it because it was unloaded, or is no longer what is on disk).
        name: the adapter's.
        seconds: time that a ``load`` took, else 0.
        problem: why, for ``refuse``; else empty.
    """

    kind: AdapterEventKind
    name: str
    seconds: float = 0.0
    problem: str = ""


class Lease:
    """One user's hold on an adapter in memory. Release it, or leave the ``with`` block, when the sequence has ended."""

    def __init__(self, adapter: LoadedAdapter, release: Callable[[], None]) -> None:
        self.adapter = adapter
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give it back. Idempotent and thread-safe."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class _Resident:
    """``retired``: leaves memory with its last lease, being unloaded or of a version that is no longer on disk."""

    adapter: LoadedAdapter
    leases: int = 0
    retired: bool = False


class Residency:
    """Thread-safe. An adapter version is resident because its weights are held here, never because requests name it.

    Adapters in use are never dropped, so memory exceeds ``max_bytes`` while everything here is leased; the number of
    running sequences bounds by how much.

    Args:
        max_bytes: above it, adapters without leases are dropped, least recently used first.
        on_event: called for each ``hit``, ``evict`` and ``drop``, outside the lock, on the calling thread.
    """

    def __init__(self, *, max_bytes: int, on_event: Callable[[AdapterEvent], None]) -> None:
        self._max_bytes = max_bytes
        self._on_event = on_event
        self._lock = threading.Lock()  # guards the residents, each one's fields included
        self._residents: OrderedDict[_Key, _Resident] = OrderedDict()  # least recently used first

    def held(self) -> frozenset[_Key]:
        """Name and digest of all whose weights are in memory."""
        with self._lock:
            return frozenset(self._residents)

    def bytes_held(self) -> int:
        """Memory that all weights here take."""
        with self._lock:
            return self._bytes_held()

    def lease(self, name: str, digest: AdapterDigest) -> Lease | None:
        """Hold this very version, retired or not; None when it is not in memory."""
        with self._lock:
            lease = self._lease((name, digest))
        if lease is not None:
            self._on_event(AdapterEvent("hit", name))
        return lease

    def make_room(self, incoming_bytes: int) -> None:
        """Drop what must go before ``incoming_bytes`` are read, so that old and new are not in memory together."""
        with self._lock:
            dropped = self._drop_unleased(incoming_bytes)
        self._report(dropped)

    def insert(self, adapter: LoadedAdapter) -> Lease:
        """Take in and hold the current version under its name, and retire the others. A version already here stays."""
        name, digest = adapter.info.name, adapter.digest
        with self._lock:
            resident = self._residents.setdefault((name, digest), _Resident(adapter))
            lease = self._hold((name, digest), resident)
            self._retire(lambda key: key[0] == name)
            resident.retired = False
            dropped = self._drop_unleased()
        self._report(dropped)
        return lease

    def retire(self, applies: Callable[[str], bool]) -> bool:
        """Drop every version whose name ``applies`` to, now or with its last lease; whether there was one."""
        with self._lock:
            found = any(applies(name) for name, _ in self._residents)
            self._retire(lambda key: applies(key[0]))
            dropped = self._drop_unleased()
        self._report(dropped)
        return found

    # --- under the lock -----------------------------------------------------------------------------------------------

    def _lease(self, key: _Key) -> Lease | None:
        resident = self._residents.get(key)
        return None if resident is None else self._hold(key, resident)

    def _hold(self, key: _Key, resident: _Resident) -> Lease:
        resident.leases += 1
        return Lease(resident.adapter, lambda: self._give_back(key))

    def _retire(self, applies: Callable[[_Key], bool]) -> None:
        for key, resident in self._residents.items():
            resident.retired |= applies(key)

    def _bytes_held(self) -> int:
        return sum(resident.adapter.size_bytes for resident in self._residents.values())

    def _drop_unleased(self, incoming_bytes: int = 0) -> list[AdapterEvent]:
        unleased = [(key, resident) for key, resident in self._residents.items() if resident.leases == 0]
        dropped = []
        for key, resident in sorted(unleased, key=lambda item: not item[1].retired):  # stable: then oldest first
            if resident.retired or self._bytes_held() + incoming_bytes > self._max_bytes:
                del self._residents[key]
                kind: AdapterEventKind = "drop" if resident.retired else "evict"
                dropped.append(AdapterEvent(kind, key[0]))
        return dropped

    # --- outside it ---------------------------------------------------------------------------------------------------

    def _give_back(self, key: _Key) -> None:
        with self._lock:
            self._residents[key].leases -= 1
            self._residents.move_to_end(key)  # used until now; while leased, its place does not matter
            dropped = self._drop_unleased()
        self._report(dropped)

    def _report(self, dropped: Sequence[AdapterEvent]) -> None:
        for event in dropped:
            self._on_event(event)
