"""The rows of one step: in which order sequences stand, and which rows each adapter is on for."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.engine.sequence import Sequence
from alora_serve.model.step import Span

Batch = list[tuple[Sequence, Span]]
"""Sequences with the tokens they run in one step, in row order."""


def arrange(shares: Listed[tuple[Sequence, int]], standing: Callable[[LoadedAdapter], tuple[int, int]]) -> Batch:
    """Spans of at most the given numbers of tokens, in row order.

    Sequences on one prefix stand side by side, and within them those of one adapter, so that shared reads and adapter
    deltas cover runs of rows: the base model first, then adapters in the order of their slots, so that their weights
    are read in place and no row is gathered; then by arrival.

    Args:
        standing: see :meth:`alora_serve.engine.lora_rows.LoraRows.standing`.
    """
    first_on: dict[int, int] = {}
    first_with: dict[tuple[int, str], int] = {}
    keyed = []
    for order, (sequence, share) in enumerate(shares):
        adapter = sequence.request.adapter
        place = standing(adapter) if adapter else (-1, -1)
        with_it = (sequence.root, adapter.digest if adapter else "")
        key = (first_on.setdefault(sequence.root, order), place, first_with.setdefault(with_it, order), order)
        keyed.append((key, sequence, share))
    keyed.sort(key=lambda item: item[0])
    # Only now, so that slots of tails are given out in this order, too.
    return [(sequence, sequence.span(share)) for _, sequence, share in keyed]


def adapter_rows(batch: Batch) -> list[tuple[LoadedAdapter, slice]]:
    """Runs of rows each adapter is on for: those of spans past their boundary. Rows before an invocation are base."""
    runs: list[tuple[LoadedAdapter, slice]] = []
    first = 0
    for sequence, span in batch:
        last = first + len(span.tokens)
        adapter = sequence.request.adapter
        if adapter is not None and not sequence.in_base_phase:
            if runs and runs[-1][0].digest == adapter.digest and runs[-1][1].stop == first:
                runs[-1] = (adapter, slice(runs[-1][1].start, last))
            else:
                runs.append((adapter, slice(first, last)))
        first = last
    return runs
