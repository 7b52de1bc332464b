"""How fast a store takes values and gives them back, through our client."""

from __future__ import annotations

from time import perf_counter
from typing import Final

from alora_serve.kv.store import KVStore, Put, StoreKey

VALUES: Final = 64
_CALL_SECONDS: Final = 60.0


def write_and_read(store: KVStore, value: bytes) -> tuple[float, float]:
    """Bytes a second of writing ``value`` under :data:`VALUES` keys, always the same, and of reading all of them.

    Raises:
        RuntimeError: it comes back changed, or not at all.
    """
    keys = [StoreKey(number.to_bytes(32, "big")) for number in range(VALUES)]
    target, found = bytearray(len(value)), set[int]()

    def copy(index: int, payload: memoryview) -> None:  # from several threads at once
        target[:] = payload
        found.add(index)

    began = perf_counter()
    store.put_many([Put(key, value) for key in keys], timeout_seconds=_CALL_SECONDS)
    written = perf_counter()
    store.get_many(keys, copy, timeout_seconds=_CALL_SECONDS)
    read = perf_counter()
    if (len(found), target) != (VALUES, value):
        raise RuntimeError(f"the store gave back {len(found)} of {VALUES} values, or changed them")
    return VALUES * len(value) / (written - began), VALUES * len(value) / (read - written)
