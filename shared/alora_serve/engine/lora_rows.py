"""LoRA in a mixed batch: after a base product, each adapter's delta on just its activated rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.engine.adapter_stack import AdapterStack, Shape, shape_of
from alora_serve.model.padding import PaddedRows, pad_rows
from alora_serve.model.projections import Projection
from alora_serve.types import AdapterDigest

NARROW_ROWS: Final = 16
"""Adapters with up to so many rows share a batched product, padded to the widest; longer ones have their own."""

Runs = tuple[tuple[AdapterStack, PaddedRows], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What runs which rows, for these adapters on these rows. Equal to itself alone: it stands for memory."""

    rows: Sequence[tuple[AdapterDigest, int, int]]
    runs: Runs


@dataclass(frozen=True, slots=True)
class _Adapt:
    """What a projection calls while adapters are on; see :data:`alora_serve.model.projections.Adapt`."""

    projection: Projection
    runs: Runs

    def __call__(self, x: Tensor, out: Tensor) -> None:
        for stack, rows in self.runs:
            stack.add_deltas(self.projection, rows, x, out)


class LoraRows:
    """Puts adapters on rows of a packed row.

    One thread: :meth:`set_rows` before a forward pass, :meth:`clear` after.

    Args:
        projections: all of the base model's.
        max_adapters: most different adapters of one step.
    """

    def __init__(self, projections: Sequence[Projection], max_adapters: int, device: torch.device) -> None:
        self._projections = projections
        self._max_adapters = max_adapters
        self._device = device
        self._stacks: dict[Shape, AdapterStack] = {}
        self._plan = _Plan((), ())
        self._adapted: list[Projection] = []

    def standing(self, adapter: LoadedAdapter) -> tuple[int, int]:
        """Where its weights lie: number of its stack and slot in it. Those that have no slot yet come last."""
        for number, stack in enumerate(self._stacks.values()):
            slot = stack.slot_of(adapter.digest)
            if slot is not None:
                return number, slot
        return len(self._stacks), 0

    def set_rows(self, rows: Sequence[tuple[LoadedAdapter, slice]]) -> None:
        """Say which rows of the next packed row each adapter is on for. Rows in no slice run base weights."""
        # While sequences only decode, one step's plan is the next one's.
        key = tuple((adapter.digest, where.start, where.stop) for adapter, where in rows)
        if self._plan.rows != key:
            # Making a plan may move weights and then fail: what the old one says of memory may be wrong by then.
            self._plan = _Plan((), ())
            self._plan = _Plan(key, self._runs_of(rows))
        runs: defaultdict[Projection, list[tuple[AdapterStack, PaddedRows]]] = defaultdict(list)
        for stack, where in self._plan.runs:
            for projection in stack.projections:
                runs[projection].append((stack, where))
        for projection, its in runs.items():
            projection.adapt = _Adapt(projection, tuple(its))
        self._adapted = list(runs)

    @property
    def plan(self) -> object:
        """What :meth:`set_rows` came to: the same object as long as the same weights lie in the same memory."""
        return self._plan

    def clear(self) -> None:
        """No adapter is on."""
        for projection in self._adapted:
            projection.adapt = None
        self._adapted = []

    def _runs_of(self, rows: Sequence[tuple[LoadedAdapter, slice]]) -> Runs:
        # By digest, as slots are: one adapter may be here under several names.
        listed: defaultdict[AdapterDigest, list[int]] = defaultdict(list)
        for adapter, where in rows:
            listed[adapter.digest].extend(range(where.start, where.stop))
        groups: defaultdict[Shape, list[LoadedAdapter]] = defaultdict(list)
        for adapter in {adapter.digest: adapter for adapter, _ in rows}.values():
            groups[shape_of(adapter)].append(adapter)
        runs: list[tuple[AdapterStack, PaddedRows]] = []
        for shape, adapters in groups.items():
            stack = self._stack(shape)
            by_slot = sorted(zip(stack.place(adapters), (listed[adapter.digest] for adapter in adapters), strict=True))
            runs.extend((stack, pad_rows(run, self._device)) for run in _runs(stack, by_slot))
        self._drop_old_stacks(keep=groups.keys())
        return tuple(runs)

    def _stack(self, shape: Shape) -> AdapterStack:
        """Of that shape; it is the most recently used then."""
        stack = self._stacks.pop(shape, None)
        if stack is None:
            stack = AdapterStack(shape, self._projections, self._max_adapters, self._device)
        self._stacks[shape] = stack
        return stack

    def _drop_old_stacks(self, keep: Collection[Shape]) -> None:
        """Copies of adapters of shapes that came and went must not add up."""
        held = 0
        for shape, stack in reversed(tuple(self._stacks.items())):
            held += len(stack)
            if held > self._max_adapters and shape not in keep:
                del self._stacks[shape]


def _runs(stack: AdapterStack, by_slot: Sequence[tuple[int, list[int]]]) -> list[list[tuple[int, list[int]]]]:
    """Slots of few rows each run together, and with them what lies between, where that is not worth a call of its own.

    Args:
        by_slot: slots and their rows, in the order of slots.
    """
    runs: list[list[tuple[int, list[int]]]] = []
    for slot, rows in by_slot:
        if runs and max(len(rows), len(runs[-1][-1][1])) <= NARROW_ROWS:
            gap = slot - runs[-1][-1][0] - 1
            if not gap or stack.passes_over(gap, max(len(its) for _, its in (*runs[-1], (slot, rows)))):
                runs[-1].append((slot, rows))
                continue
        runs.append([(slot, rows)])
    return runs
