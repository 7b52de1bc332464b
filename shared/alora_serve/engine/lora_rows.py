"""LoRA in a mixed batch: after a base projection, each adapter's delta on just its activated rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from alora_serve.adapters.lora import LoadedAdapter, LoraPair, add_delta_


class LoraRows:
    """Forward hooks on the base model's linear modules that add adapters' deltas to their rows.

    A module gets its hook when an adapter that targets it is first used, so that an unadapted model runs unhooked.
    One thread: :meth:`set_rows` before a forward pass, :meth:`clear` after.

    Args:
        linears: every adaptable module by full name.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._hooked: set[str] = set()
        self._deltas: dict[str, list[tuple[LoraPair, slice]]] = {}

    def set_rows(self, rows: Sequence[tuple[LoadedAdapter, slice]]) -> None:
        """Say which rows of the next packed row each adapter is on for. Rows in no slice run base weights."""
        deltas: defaultdict[str, list[tuple[LoraPair, slice]]] = defaultdict(list)
        for adapter, where in rows:
            for name, pair in adapter.pairs.items():
                deltas[name].append((pair, where))
        for name in deltas.keys() - self._hooked:
            self._linears[name].register_forward_hook(self._hook(name))
            self._hooked.add(name)
        self._deltas = dict(deltas)

    def clear(self) -> None:
        """No adapter is on."""
        self._deltas = {}

    def _hook(self, name: str):  # type: ignore[no-untyped-def] # torch's hook type is private
        def add_deltas(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            for pair, rows in self._deltas.get(name, ()):
                add_delta_(output[0, rows], args[0][0, rows], pair)

        return add_deltas
