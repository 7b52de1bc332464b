"""Copies of fetched KV from host memory to where resident KV lies: in one step on a processor, pinned ones to a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, Protocol

import torch
from torch import Tensor

from alora_serve.model.threads import ThreadsFor

STAGED_BYTES: Final = 2 << 20
"""First size of a pinned buffer: a stored part fits."""

STAGING_BUFFERS: Final = 2
"""While one crosses the bus, the next is verified and filled."""


class HostCopies(Protocol):
    """Copies out of host memory that is gone right after. Thread-safe."""

    def begin(self) -> None:
        """What is copied from now on comes after all that was done with its targets' memory before."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy; the source may be overwritten when this returns."""

    def finish(self) -> None:
        """Return when every copy begun by this thread's callers has arrived."""


class DirectCopies:
    """To host memory."""

    def begin(self) -> None:
        """Nothing is under way."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy at once, on this thread alone where the part is small: others may be computing."""
        with ThreadsFor(source.nbytes, 0):
            target.copy_(source)

    def finish(self) -> None:
        """Nothing is under way."""


@dataclass(slots=True)
class _Staging:
    """A pinned buffer and the event after which its last contents have left it."""

    memory: Tensor
    left: torch.cuda.Event


class PinnedCopies:  # pragma: no cover - its tests need a GPU
    """To a GPU through a few pinned buffers, on a stream of their own, so that steps of the engine go on meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        for _ in range(STAGING_BUFFERS):
            memory = torch.empty(STAGED_BYTES, dtype=torch.uint8, pin_memory=True)
            self._free.put(_Staging(memory, torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Memory is given out anew while steps that read its last contents are under way: copies wait for those."""
        self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Into a pinned buffer, and from there as the bus has time."""
        staging = self._free.get()
        try:
            staging.left.synchronize()
            if source.nbytes > staging.memory.nbytes:
                staging.memory = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=True)
            staged = staging.memory[: source.nbytes].view(source.dtype).view(source.shape)
            staged.copy_(source)
            with torch.cuda.stream(self._stream):
                target.copy_(staged, non_blocking=True)
                staging.left.record(self._stream)
        finally:
            self._free.put(staging)

    def finish(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()


def host_copies(device: torch.device) -> HostCopies:
    """What copies to this device."""
    return PinnedCopies(device) if device.type == "cuda" else DirectCopies()
