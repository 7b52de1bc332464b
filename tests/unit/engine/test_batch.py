"""Rows of a step stand so that shared prefixes and adapters are runs, and adapters touch their own rows alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.engine.batch import adapter_rows, arrange
from alora_serve.engine.prefix_cache import PrefixCache
from alora_serve.engine.sequence import Sequence
from alora_serve.engine.sequence_request import SequenceId, SequenceRequest
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import Prefix
from alora_serve.model.step import NARROW_TOKENS
from alora_serve.model.tails import FIRST_TAIL_TOKENS, TailPool
from alora_serve.types import AdapterDigest, AdapterInfo, SamplingParams
from in_process import CountingMetrics

LAYOUT = KVLayout(1, 1, 1, "float32")
CPU = torch.device("cpu")
ROOT = BlockHash(b"r" * 32)


def _adapter(name: str) -> LoadedAdapter:
    return LoadedAdapter(AdapterInfo(name, AdapterDigest(name * 64), "alora", 1, (), (1,), "", 0, resident=True), {})


A, B = _adapter("a"), _adapter("b")


def _without_slot(_: LoadedAdapter) -> tuple[int, int]:
    """Where adapters stand that run for the first time."""
    return 0, 0


@dataclass
class Bench:
    cache: PrefixCache
    made: int = 0

    def prefix(self, tokens: int) -> Prefix:
        promised = self.cache.reserve(Prefix(), tokens)
        return Prefix((promised,))

    def sequence(
        self, prompt: int, *, prefix: Prefix | None = None, adapter: LoadedAdapter | None = None, base_until: int = 0
    ) -> Sequence:
        self.made += 1
        tokens = tuple(range(prompt))
        request = SequenceRequest(
            prompt=tokens,
            prefix=prefix or Prefix(),
            chain=BlockChain(ROOT, tokens, 4),
            base_until=base_until if adapter else None,
            adapter=adapter,
            sampling=SamplingParams(),
        )
        return Sequence(
            id=SequenceId(self.made),
            request=request,
            sink=lambda _: None,
            cache=self.cache,
            tails=TailPool(LAYOUT, CPU),
            submitted_at=0.0,
        )


@pytest.fixture
def bench() -> Bench:
    return Bench(PrefixCache(LAYOUT, budget_bytes=1 << 20, device=CPU, metrics=CountingMetrics()))


def test_those_on_one_prefix_stand_together_and_in_it_those_of_one_adapter(bench: Bench) -> None:
    shared, other = bench.prefix(8), bench.prefix(8)
    makers = [(shared, B), (other, A), (shared, A), (None, None), (shared, B), (other, None), (shared, None)]
    sequences = [bench.sequence(10, prefix=prefix, adapter=adapter, base_until=8) for prefix, adapter in makers]
    batch = arrange([(sequence, 2) for sequence in sequences], _without_slot)
    order = [sequences.index(sequence) for sequence, _ in batch]
    assert order == [6, 0, 4, 2, 5, 1, 3], "prefixes in the order of their first; on them base, then adapters likewise"


def test_adapters_stand_in_the_order_of_their_slots_and_their_tails_likewise(bench: Bench) -> None:
    shared, tails = bench.prefix(8), TailPool(LAYOUT, CPU)
    sequences = [bench.sequence(10, prefix=shared, adapter=adapter, base_until=8) for adapter in (A, B)]
    for sequence in sequences:
        sequence.tails = tails
    batch = arrange([(sequence, 2) for sequence in sequences], {A: (0, 1), B: (0, 0)}.__getitem__)
    assert [sequence.request.adapter for sequence, _ in batch] == [B, A]
    assert [span.own.segment.slot for _, span in batch] == [0, 1]  # type: ignore[attr-defined] # of an arena


def test_equal_batches_stand_alike(bench: Bench) -> None:
    shared = bench.prefix(8)
    sequences = [bench.sequence(10, prefix=shared, adapter=adapter, base_until=8) for adapter in (A, B, A)]
    for _ in range(3):
        assert [s.id for s, _ in arrange([(s, 1) for s in sequences], _without_slot)] == [1, 3, 2]


def test_an_adapter_is_on_for_its_rows_past_the_boundary_and_for_no_others(bench: Bench) -> None:
    before = bench.sequence(10, adapter=A, base_until=6)
    at = bench.sequence(10, prefix=bench.prefix(6), adapter=A, base_until=6)
    lora = bench.sequence(3, adapter=B, base_until=0)
    base = bench.sequence(4)
    batch = [(sequence, sequence.span(sequence.pending_tokens)) for sequence in (before, at, base, lora)]
    assert [len(span.tokens) for _, span in batch] == [6, 4, 4, 3]
    assert adapter_rows(batch) == [(A, slice(6, 10)), (B, slice(14, 17))]


def test_neighbours_of_one_adapter_make_one_run(bench: Bench) -> None:
    sequences = [bench.sequence(count, adapter=adapter) for count, adapter in ((3, A), (2, A), (2, B), (1, A))]
    batch = [(sequence, sequence.span(sequence.pending_tokens)) for sequence in sequences]
    assert adapter_rows(batch) == [(A, slice(0, 5)), (B, slice(5, 7)), (A, slice(7, 8))]


def test_neighbours_of_one_adapter_under_two_names_make_one_run(bench: Bench) -> None:
    twin = LoadedAdapter(replace(A.info, name="twin"), A.pairs)
    sequences = [bench.sequence(count, adapter=adapter) for count, adapter in ((3, A), (2, twin))]
    ((adapter, rows),) = adapter_rows([(sequence, sequence.span(sequence.pending_tokens)) for sequence in sequences])
    assert (adapter.digest, rows) == (A.digest, slice(0, 5))


def test_a_span_never_crosses_the_boundary(bench: Bench) -> None:
    """One span has one adapter state; a chunk across the boundary would adapt base tokens or leave it out."""
    sequence = bench.sequence(10, adapter=A, base_until=6)
    assert sequence.pending_tokens == 6
    span = sequence.span(10)
    assert span.tokens == tuple(range(6))
    sequence.commit(span)
    assert not sequence.in_base_phase
    assert sequence.pending_tokens == 4
    adapted = sequence.span(4)
    assert (adapted.start, adapted.tokens) == (6, (6, 7, 8, 9))
    assert adapted.own.segment not in bench.cache._names
    assert span.destination.segment in bench.cache._names


def test_what_a_step_may_have_written_to_a_tail_is_zero_again_when_its_sequence_leaves(bench: Bench) -> None:
    """Of a step that failed as well: its span is never committed, and what it left may be no number."""
    sequence = bench.sequence(3, adapter=A)
    for is_committed in (True, False):
        span = sequence.span(sequence.pending_tokens)
        span.destination.positions().fill_(float("nan"))
        if is_committed:
            sequence.commit(span)
            sequence.append(7)
    arena = span.own.segment.data
    assert arena.isnan().any()
    sequence.release()
    assert not arena.any()


def test_answers_of_the_base_model_are_computed_in_a_tail_and_go_on_in_the_memory_of_their_prompt(
    bench: Bench,
) -> None:
    prompt = 4 + NARROW_TOKENS
    sequence = bench.sequence(prompt)
    first = sequence.span(4)
    sequence.commit(first)
    end = sequence.span(NARROW_TOKENS)
    assert (end.shared, end.is_narrow_tail) == ((first.own,), True), "the last few of a prompt go with its answer"
    end.destination.positions().fill_(-1.0)
    sequence.commit(end)
    for number in range(FIRST_TAIL_TOKENS + 3):  # more than the first tail takes
        sequence.append(7)
        span = sequence.span(1)
        assert (span.shared, span.own.tokens) == ((first.own,), NARROW_TOKENS + number + 1)
        span.destination.positions().fill_(float(number))
        sequence.commit(span)
    answer = sequence.publish(tail=True)
    assert answer is not None
    (home,) = answer.prefix.slices
    assert (home.segment, home.tokens) == (first.own.segment, prompt + FIRST_TAIL_TOKENS + 3)
    assert home.positions()[0, 0, 0, 4:, 0].tolist() == [-1.0] * NARROW_TOKENS + list(range(FIRST_TAIL_TOKENS + 3))
    sequence.release()
    assert sequence.tails.used_bytes == 0
