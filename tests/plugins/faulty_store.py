"""A store that fails on demand: at a chosen call, after some values, or for chosen keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from alora_serve.errors import StoreError
from alora_serve.kv.store import Put, Sink, StoreKey
from in_process import MemoryStore


@dataclass
class FaultyStore(MemoryStore):
    """Raises ``faults[operation, call]`` at that call of that operation, both counted from 0.

    Attributes:
        faults: by operation (``get``, ``contains``, ``put``, ``delete``) and number of the call.
        values_before_fault: values that a failing ``get`` hands out, or a failing ``put`` stores, before it raises.
        absent: keys that ``get`` does not find though ``contains`` does: gone between the two.
        calls: how often each operation was called.
        asked: the keys of every ``contains``, in order.
        timeouts: seconds given to each call.
    """

    faults: dict[tuple[str, int], StoreError] = field(default_factory=dict)
    values_before_fault: int = 0
    absent: set[StoreKey] = field(default_factory=set)
    calls: Counter[str] = field(default_factory=Counter)
    asked: list[list[StoreKey]] = field(default_factory=list)
    timeouts: list[tuple[str, float]] = field(default_factory=list)

    def _fault(self, operation: str, timeout_seconds: float) -> StoreError | None:
        call = self.calls[operation]
        self.calls[operation] += 1
        self.timeouts.append((operation, timeout_seconds))
        return self.faults.get((operation, call), self.faults.get((operation, -1)))

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        fault = self._fault("get", timeout_seconds)
        here = [(index, key) for index, key in enumerate(keys) if key in self.values and key not in self.absent]
        for index, key in here[: self.values_before_fault] if fault else here:
            sink(index, memoryview(self.values[key]))
        if fault:
            raise fault

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        self.asked.append(list(keys))
        if fault := self._fault("contains", timeout_seconds):
            raise fault
        return super().contains_many(keys, timeout_seconds=timeout_seconds)

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        fault = self._fault("put", timeout_seconds)
        super().put_many(puts[: self.values_before_fault] if fault else puts, timeout_seconds=timeout_seconds)
        if fault:
            raise fault

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        if fault := self._fault("delete", timeout_seconds):
            raise fault
        super().delete_many(keys, timeout_seconds=timeout_seconds)
