"""What moving blocks is asked with and what comes of it: deadlines, memory on either side, results, counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from alora_serve.kv.keys import BlockHash
from alora_serve.kv.record import MissReason

DropReason = Literal["full", "timeout", "unavailable", "backlog", "quota"]
"""Why a block was not written: ``quota`` is the tenant's, all others are the store's."""


@dataclass(frozen=True, slots=True)
class StoreTiming:
    """How long the store may take: ``base_seconds`` plus a second for each ``bytes_per_second``."""

    base_seconds: float = 0.5
    bytes_per_second: float = 20e6

    def timeout_seconds(self, size_bytes: int) -> float:
        """Deadline for moving so many bytes."""
        return self.base_seconds + size_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block of a chain: the positions it covers and the name it is stored under."""

    start: int
    tokens: int
    name: BlockHash

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.tokens


class KVDestination(Protocol):
    """Memory that takes fetched KV: positions ``[start, end)`` of one sequence."""

    @property
    def start(self) -> int:
        """First position it takes."""

    @property
    def end(self) -> int:
        """Position after the last it takes."""

    def write(self, start: int, layers: range, values: Tensor) -> None:
        """Take KV of some layers from position ``start`` on.

        The values may be gone when this returns. Called from several threads at once, never twice for one place.

        Args:
            values: ``[layers, 2, kv_heads, n, head_dim]`` in host memory, any strides.
        """

    def finish(self) -> None:
        """Return when all that was written is there for whoever reads the memory."""


class KVSource(Protocol):
    """Memory that holds KV to be stored."""

    def pieces(self, start: int, end: int) -> Iterable[tuple[Tensor, int]]:
        """Views ``[layers, 2, kv_heads, n, head_dim]`` that together hold the positions.

        Each comes with its distance from ``start``.
        """


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What came from the store.

    Attributes:
        end: positions up to here are in the destination: the longest contiguous run of good blocks.
        fetched_bytes: payload bytes of the blocks in that run.
        misses: blocks not had, by reason.
        present: names seen good, so that a writer need not ask for them again.
    """

    end: int
    fetched_bytes: int
    misses: Mapping[str, int]
    present: frozenset[BlockHash]


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What went to the store.

    Attributes:
        stored_bytes: bytes written.
        drops: blocks not written, by reason; see :data:`DropReason`.
    """

    stored_bytes: int = 0
    drops: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: StoreResult) -> StoreResult:
        """Both together."""
        drops = Counter(self.drops) + Counter(other.drops)
        return StoreResult(self.stored_bytes + other.stored_bytes, dict(drops))


class BlockMetrics(Protocol):
    """Counts what algorithms here decide; implemented in ``metrics/``."""

    def store_miss(self, reason: MissReason, blocks: int) -> None:
        """Blocks not had from the store."""

    def store_drop(self, reason: DropReason, blocks: int) -> None:
        """Blocks not written to the store."""
