"""Who is in the store, how large and how recent: the bookkeeping of one write transaction, in the same tree as values.

=============================  ====================================================
``v`` key                      the value
``m`` key                      class, stamp, cost
``o`` class stamp key          nothing; sorted, so the first entry is the next victim
``s``                          used bytes, next stamp
=============================  ====================================================

Class 0 is a partial tail, class 1 a full block. Stamps count upwards over all processes; no clock is involved. Within
one request the first key gets the highest stamp, because a chain of blocks is worth keeping from its head.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence

import lmdb
from typing_extensions import Buffer

from alora_serve.errors import StoreFullError
from alora_serve.kv.store import StoreKey

_META = struct.Struct(">BQQ")
_ORDER = struct.Struct(">cBQ")
_TOTALS = struct.Struct(">QQ")
_TOTALS_KEY = b"s"
_PAGE_HEADER_BYTES = 16


def value_key(key: StoreKey) -> bytes:
    """Where the value of ``key`` lies in the tree."""
    return b"v" + key


class WriteIndex:
    """Puts, touches, deletes and evicts inside one write transaction. Call ``save`` before the commit."""

    def __init__(self, txn: lmdb.Transaction[bytes], page_bytes: int) -> None:
        self._txn = txn
        self._page_bytes = page_bytes
        self.used_bytes: int
        self._next_stamp: int
        self.used_bytes, self._next_stamp = _TOTALS.unpack(txn.get(_TOTALS_KEY, _TOTALS.pack(0, 0)))

    def save(self) -> None:
        """Write the totals back."""
        self._txn.put(_TOTALS_KEY, _TOTALS.pack(self.used_bytes, self._next_stamp))

    def cost_bytes(self, value_bytes: int) -> int:
        """Whole pages that a value of this size occupies."""
        pages = -(-(value_bytes + _PAGE_HEADER_BYTES) // self._page_bytes)
        return pages * self._page_bytes

    def reserve_stamps(self, count: int) -> int:
        """Take ``count`` stamps and return the highest."""
        self._next_stamp += count
        return self._next_stamp - 1

    def put(
        self,
        key: StoreKey,
        value: Buffer,
        *,
        evict_first: bool,
        stamp: int,
        budget_bytes: int,
        protected: Collection[StoreKey],
    ) -> None:
        """Store one value, evicting others but never ``protected`` ones, of which ``key`` is one.

        Raises ``StoreFullError`` if that is not enough; then the transaction must be aborted.
        """
        cost = self.cost_bytes(memoryview(value).nbytes)
        replaced = self._txn.get(b"m" + key)
        excess_bytes = self.used_bytes + cost - budget_bytes - (_META.unpack(replaced)[2] if replaced else 0)
        if excess_bytes > 0 and self.evict(excess_bytes, protected) < excess_bytes:
            raise StoreFullError(f"no room for {cost} bytes within the budget of {budget_bytes}")
        self._forget(key)
        self._txn.put(value_key(key), value)
        self._remember(key, 0 if evict_first else 1, stamp, cost)

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """Make the keys recent, the first most. Absent ones are skipped."""
        highest = self.reserve_stamps(len(keys))
        for offset, key in enumerate(keys):
            meta = self._forget(key)
            if meta is not None:
                rank, _, cost = meta
                self._remember(key, rank, highest - offset, cost)

    def delete(self, keys: Iterable[StoreKey]) -> None:
        """Remove the keys; absent ones are ignored."""
        for key in keys:
            self._forget(key)
            self._txn.delete(value_key(key))

    def evict(self, wanted_bytes: int, protected: Collection[StoreKey]) -> int:
        """Remove the least recent values, partial tails first, until ``wanted_bytes`` are free. Returns bytes freed."""
        victims: list[StoreKey] = []
        freed_bytes = 0
        with self._txn.cursor() as cursor:
            found = cursor.set_range(b"o")
            while found and freed_bytes < wanted_bytes and cursor.key()[:1] == b"o":
                key = StoreKey(cursor.key()[_ORDER.size :])
                if key not in protected:
                    victims.append(key)
                    freed_bytes += int.from_bytes(cursor.value(), "big")
                found = cursor.next()
        self.delete(victims)
        return freed_bytes

    def _remember(self, key: StoreKey, rank: int, stamp: int, cost: int) -> None:
        self._txn.put(b"m" + key, _META.pack(rank, stamp, cost))
        self._txn.put(_ORDER.pack(b"o", rank, stamp) + key, cost.to_bytes(8, "big"))
        self.used_bytes += cost

    def _forget(self, key: StoreKey) -> tuple[int, int, int] | None:
        packed = self._txn.get(b"m" + key)
        if packed is None:
            return None
        rank, stamp, cost = _META.unpack(packed)
        self._txn.delete(b"m" + key)
        self._txn.delete(_ORDER.pack(b"o", rank, stamp) + key)
        self.used_bytes -= cost
        return rank, stamp, cost
