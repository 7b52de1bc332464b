"""Where the time of a decode step goes: clocks around the engine's own parts, put there from outside.

Each call of a part costs its clock two readings, some 0.2 us; a step has a few hundred. Kernels of a GPU run on after
the call that started them, so these clocks say something on processors alone.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final

from alora_serve.engine.adapter_stack import AdapterStack
from alora_serve.engine.stepper import Stepper
from alora_serve.model.packed_row import PackedRow
from alora_serve.model.weights import HalfWeights, Int8Weights, PackedWeights, PlainWeights

PARTS: Final[tuple[tuple[str, type, str], ...]] = (
    *(
        ("products with the model's weights", weights, "product")
        for weights in (PlainWeights, PackedWeights, HalfWeights, Int8Weights)
    ),
    ("attention to the shared prefix", PackedRow, "_piece"),
    ("attention to tails, and writing them", PackedRow, "_tails"),
    ("products with adapters' weights", AdapterStack, "add_deltas"),
)
"""What a kind of work is called, and the method that does it. None runs inside another."""

REST: Final = "everything else"
WHOLE: Final = "a step"


class StepTimers:
    """Seconds of each decode step of so many sequences, by kind of work.

    Attributes:
        steps: one mapping a step, of every kind and :data:`WHOLE`.
    """

    def __init__(self, sequences: int) -> None:
        self.steps: list[dict[str, float]] = []
        self._sequences = sequences
        self._spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The clocks run while the block does, in every engine of this process."""
        replaced = [(owner, name, getattr(owner, name)) for _, owner, name in PARTS]
        for kind, owner, name in PARTS:
            setattr(owner, name, self._timed(kind, getattr(owner, name)))
        run = Stepper.run
        Stepper.run = self._whole(run)  # type: ignore[method-assign] # for as long as the block runs
        try:
            yield
        finally:
            Stepper.run = run  # type: ignore[method-assign]
            for owner, name, method in replaced:
                setattr(owner, name, method)

    def _timed(self, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self._spent[kind] += perf_counter() - began

        return timed

    def _whole(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def timed(stepper: Stepper, shares: Any, finish: Any) -> Any:
            self._spent.clear()
            began = perf_counter()
            batch = run(stepper, shares, finish)
            seconds = perf_counter() - began
            if [len(span.tokens) for _, span in batch] == [1] * self._sequences:
                kinds = {kind: self._spent[kind] for kind, _, _ in PARTS}
                self.steps.append({**kinds, REST: seconds - sum(kinds.values()), WHOLE: seconds})
            return batch

        return timed
