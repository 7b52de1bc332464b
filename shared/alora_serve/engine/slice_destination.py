"""Where fetched KV goes: a reserved slice of resident memory, for as long as anybody wants it."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Event

from torch import Tensor

from alora_serve.model.host_copies import HostCopies
from alora_serve.model.kv_memory import KVSlice


class AbandonedError(Exception):
    """Nobody waits for the fetch any more. Says nothing of the store, and reaches no client."""


@dataclass(frozen=True, slots=True)
class SliceDestination:
    """A reserved slice as memory for fetched KV; see :class:`alora_serve.kv.transfer.KVDestination`.

    Attributes:
        abandoned: set, on any thread, when nobody waits any more: the next part is then refused, which ends the fetch.
    """

    target: KVSlice
    copies: HostCopies
    abandoned: Event

    @property
    def start(self) -> int:
        """First position of the slice."""
        return self.target.start

    @property
    def end(self) -> int:
        """Position after its last."""
        return self.target.end

    def check_wanted(self) -> None:
        """Return if somebody waits.

        Raises:
            AbandonedError: nobody does.
        """
        if self.abandoned.is_set():
            raise AbandonedError

    def write(self, start: int, layers: range, values: Tensor) -> None:
        """Copy into the slice.

        Raises:
            AbandonedError: nobody waits for it.
        """
        self.check_wanted()
        segment = self.target.segment
        first = start - segment.start
        self.copies.copy(values, segment.data[layers.start : layers.stop, :, :, first : first + values.shape[3]])

    def finish(self) -> None:
        """Wait for copies under way."""
        self.copies.finish()
