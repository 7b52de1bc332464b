"""Which tokens may come next, worked out beside the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from alora_serve.errors import AloraServeError
from alora_serve.model.structure.constraint import Constraint

Mask: TypeAlias = bytes | None
"""A bit for each token id, little-endian; None where every token may come."""


class MaskWorker:
    """Computes masks in a thread of its own: most take microseconds, the first ones of a form milliseconds."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        # Begun here: at a limit of threads it is the engine that does not start, and no step that fails.
        self._thread.submit(lambda: None)

    def start(self, constraints: Sequence[Constraint | None]) -> Future[list[Mask | AloraServeError]]:
        """The masks to come, or the error of an answer that cannot go on. Leave the constraints alone until then."""
        if any(constraints):
            return self._thread.submit(lambda: [_mask(constraint) for constraint in constraints])
        free: Future[list[Mask | AloraServeError]] = Future()
        free.set_result([None] * len(constraints))
        return free

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _mask(constraint: Constraint | None) -> Mask | AloraServeError:
    if constraint is None:
        return None
    try:
        return constraint.mask()
    except AloraServeError as error:  # it ends this answer and no other
        return error
