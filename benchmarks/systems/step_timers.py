"""Where the time of a step goes: clocks around the engine's own parts, put there from outside.

Each call of a part costs its clock two readings, some 0.2 us; a step has a few hundred. Kernels of a GPU run on after
the call that started them, so these clocks say something on processors alone.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
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
    ("attention of a prompt's chunk to itself", PackedRow, "_causal"),
    ("attention to tails, and writing them", PackedRow, "_tails"),
    ("products with adapters' weights", AdapterStack, "add_deltas"),
)
"""What a kind of work is called, and the method that does it. None runs inside another."""

_KINDS: Final = tuple(dict.fromkeys(kind for kind, _, _ in PARTS))
REST: Final = "everything else"
WHOLE: Final = "a step"
PREFILL: Final = "a prefill"


class StepTimers:
    """Seconds of steps, by kind of work."""

    def __init__(self) -> None:
        self._steps: list[tuple[list[int], dict[str, float]]] = []
        self._spent: dict[str, float] = defaultdict(float)
        # A step that ends a sequence says so while it runs: who is told first waits here until it is counted.
        self._running = Lock()

    def decode_steps(self, sequences: int) -> dict[str, list[float]]:
        """Of each step in which so many sequences decoded and nothing else ran, by kind; the last is :data:`WHOLE`.

        Raises:
            RuntimeError: there was none.
        """
        with self._running:
            found = [seconds for lengths, seconds in self._steps if lengths == [1] * sequences]
        if not found:
            raise RuntimeError("no step had all sequences in it: ask for more tokens")
        # A kind of work that there was none of is none.
        return {kind: [step[kind] for step in found] for kind in found[0] if any(step[kind] for step in found)}

    def prefill(self) -> dict[str, float]:
        """All steps together, those of one prefill, by kind; the last is :data:`PREFILL`."""
        with self._running:
            kinds = {kind: sum(seconds[kind] for _, seconds in self._steps) for kind in (*_KINDS, REST)}
        return {**{kind: seconds for kind, seconds in kinds.items() if seconds}, PREFILL: sum(kinds.values())}

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
            with self._running:
                self._spent.clear()
                began = perf_counter()
                batch = run(stepper, shares, finish)
                seconds = perf_counter() - began
                kinds = {kind: self._spent[kind] for kind in _KINDS}
                lengths = [len(span.tokens) for _, span in batch]
                self._steps.append((lengths, {**kinds, REST: seconds - sum(kinds.values()), WHOLE: seconds}))
                return batch

        return timed
