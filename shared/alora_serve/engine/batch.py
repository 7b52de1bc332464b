"""The rows of one step: in which order sequences stand, and which rows each adapter is on for."""

from __future__ import annotations

from collections.abc import Sequence as Listed

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.engine.sequence import Sequence
from alora_serve.model.step import Span

Batch = list[tuple[Sequence, Span]]
"""Sequences with the tokens they run in one step, in row order."""


def arrange(shares: Listed[tuple[Sequence, int]]) -> Batch:
    """Spans of at most the given numbers of tokens, in row order.

    Sequences on one prefix stand side by side, and within them those of one adapter, so that shared reads and adapter
    deltas cover runs of rows. The order depends on nothing but arrival, prefix and adapter: equal batches round alike.
    """
    first_on: dict[int, int] = {}
    first_with: dict[tuple[int, str], int] = {}
    keyed = []
    for order, (sequence, share) in enumerate(shares):
        span = sequence.span(share)
        root = id(span.shared[0].segment) if span.shared else id(sequence)
        digest = sequence.request.adapter.digest if sequence.request.adapter else ""
        # By arrival, not by digest: slots of tails and adapters are given out by arrival, too, and match rows so.
        key = (first_on.setdefault(root, order), first_with.setdefault((root, digest), order), order)
        keyed.append((key, sequence, span))
    keyed.sort(key=lambda item: item[0])
    return [(sequence, span) for _, sequence, span in keyed]


def adapter_rows(batch: Batch) -> list[tuple[LoadedAdapter, slice]]:
    """Runs of rows each adapter is on for: those of spans past their boundary. Rows before an invocation are base."""
    runs: list[tuple[LoadedAdapter, slice]] = []
    first = 0
    for sequence, span in batch:
        last = first + len(span.tokens)
        adapter = sequence.request.adapter
        if adapter is not None and not sequence.in_base_phase:
            if runs and runs[-1][0] is adapter and runs[-1][1].stop == first:
                runs[-1] = (adapter, slice(runs[-1][1].start, last))
            else:
                runs.append((adapter, slice(first, last)))
        first = last
    return runs
