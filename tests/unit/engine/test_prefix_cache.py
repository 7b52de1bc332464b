"""Shared KV never changes under its readers, never leaves while pinned, and stays inside its budget otherwise."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alora_serve.engine import prefix_cache
from alora_serve.engine.prefix_cache import MIN_SLACK_TOKENS, PrefixCache
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.kv.layout import KVLayout
from alora_serve.model.kv_memory import KVSegment, KVSlice, Prefix
from in_process import CountingMetrics

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")
TOKEN_BYTES = LAYOUT.bytes_per_token
BLOCK_TOKENS = 4
ROOT = BlockHash(b"r" * 32)


def _chain(tokens: Sequence[int]) -> BlockChain:
    return BlockChain(ROOT, tokens, BLOCK_TOKENS)


def _value(tokens: Sequence[int]) -> float:
    """The one KV value of the last of these tokens: exact in float32, other for any other history."""
    return float(zlib.crc32(bytes(tokens)) % (1 << 24))


def _write(target: KVSlice, tokens: Sequence[int], count: int) -> None:
    for index in range(count):
        target.segment.data[:, :, :, target.offset + index] = _value(tokens[: target.start + index + 1])


def _check(prefix: Prefix, tokens: Sequence[int]) -> None:
    found = [value for part in prefix.slices for value in part.layer(0)[0][0, :, 0].tolist()]
    assert found == [_value(tokens[: position + 1]) for position in range(prefix.tokens)]


def _segments(cache: PrefixCache) -> list[KVSegment]:
    return list(cache._names)


def _pins(cache: PrefixCache) -> int:
    return sum(segment.pins for segment in _segments(cache))


@pytest.fixture
def metrics() -> CountingMetrics:
    return CountingMetrics()


@pytest.fixture
def cache(metrics: CountingMetrics) -> PrefixCache:
    return PrefixCache(LAYOUT, budget_bytes=1 << 20, device=torch.device("cpu"), metrics=metrics)


def _small_cache(tokens: int, metrics: CountingMetrics | None = None) -> PrefixCache:
    counting = metrics or CountingMetrics()
    return PrefixCache(LAYOUT, budget_bytes=tokens * TOKEN_BYTES, device=torch.device("cpu"), metrics=counting)


def _add(cache: PrefixCache, tokens: Sequence[int]) -> Prefix:
    """Make these tokens resident, as a prefill does; the caller holds a pin on the result."""
    chain = _chain(tokens)
    prefix = cache.acquire(chain, len(tokens))
    _check(prefix, tokens)
    promised = cache.reserve(prefix, len(tokens) - prefix.tokens)
    _write(promised, tokens, promised.tokens)
    whole = prefix.append(promised)
    cache.publish(chain, whole, prefix.tokens, len(tokens))
    cache.pin(whole)
    cache.settle(promised, promised.tokens)
    cache.release(prefix)
    return whole


CONVERSATION = tuple(range(30))


def test_nothing_is_resident_at_first(cache: PrefixCache, metrics: CountingMetrics) -> None:
    assert cache.acquire(_chain(CONVERSATION), 30) == Prefix()
    assert (cache.size_bytes, metrics.counts["resident tokens"]) == (0, 0)


@pytest.mark.parametrize("limit", [1, 4, 5, 29, 30, 100])
def test_what_was_published_is_found_up_to_the_limit(cache: PrefixCache, limit: int) -> None:
    cache.release(_add(cache, CONVERSATION))
    found = cache.acquire(_chain(CONVERSATION), limit)
    assert found.tokens == min(limit, 30)
    _check(found, CONVERSATION)


@pytest.mark.parametrize("common", range(30))
def test_another_conversation_gets_the_blocks_it_has_in_common(cache: PrefixCache, common: int) -> None:
    """Whole blocks; tails are named by their exact end, so the inside of one is not found."""
    cache.release(_add(cache, CONVERSATION))
    other = (*CONVERSATION[:common], 99, *CONVERSATION[common + 1 :])
    assert cache.acquire(_chain(other), 30).tokens == common - common % BLOCK_TOKENS


def test_the_longest_tail_of_the_next_block_is_found(cache: PrefixCache) -> None:
    for end in (5, 7, 6):
        cache.release(_add(cache, CONVERSATION[:end]))
    assert cache.acquire(_chain(CONVERSATION), 30).tokens == 7
    assert cache.acquire(_chain((*CONVERSATION[:6], 99)), 30).tokens == 6


def test_extending_a_conversation_costs_its_new_tokens_alone(cache: PrefixCache) -> None:
    first = _add(cache, CONVERSATION[:10])
    size = cache.size_bytes
    assert size == (10 + MIN_SLACK_TOKENS) * TOKEN_BYTES
    assert cache.used_bytes == 10 * TOKEN_BYTES
    longer = _add(cache, CONVERSATION)
    assert cache.size_bytes == size
    assert cache.used_bytes == 30 * TOKEN_BYTES
    assert longer.slices == (KVSlice(first.slices[0].segment, 0, 30),)
    _check(first, CONVERSATION)


def test_a_conversation_longer_than_its_slack_goes_on_in_a_segment_of_the_rest(cache: PrefixCache) -> None:
    tokens = tuple(index % 251 for index in range(400))
    first = _add(cache, tokens[:10])
    longer = _add(cache, tokens)
    assert [part.tokens for part in longer.slices] == [10, 390]
    assert longer.slices[0] == first.slices[0]
    assert cache.size_bytes == (10 + MIN_SLACK_TOKENS + 390 + MIN_SLACK_TOKENS) * TOKEN_BYTES
    _check(longer, tokens)


def test_a_second_answer_to_the_same_prefix_gets_memory_of_its_own(cache: PrefixCache) -> None:
    _add(cache, CONVERSATION[:8])
    left = (*CONVERSATION[:8], *range(50, 60))
    right = (*CONVERSATION[:8], *range(70, 80))
    one, other = _add(cache, left), _add(cache, right)
    assert len(one.slices) == 1
    assert [part.segment is one.slices[0].segment for part in other.slices] == [True, False]
    _check(one, left)
    _check(other, right)


def test_two_conversations_share_the_memory_of_their_system_prompt(cache: PrefixCache) -> None:
    system = tuple(range(200, 240))
    prefixes = [_add(cache, (*system, *range(start, start + 9))) for start in (0, 20, 40)]
    assert len({part.segment for prefix in prefixes for part in prefix.slices}) == 3
    assert all(prefix.slices[0].segment is prefixes[0].slices[0].segment for prefix in prefixes)
    assert cache.size_bytes <= (len(system) + 3 * (9 + MIN_SLACK_TOKENS)) * TOKEN_BYTES


def test_two_at_once_in_one_place_do_not_write_over_each_other(cache: PrefixCache) -> None:
    base = _add(cache, CONVERSATION[:8])
    first, second = cache.reserve(base, 4), cache.reserve(base, 4)
    assert first.segment is base.slices[0].segment
    assert second.segment is not first.segment


def test_an_unfinished_reservation_is_free_again(cache: PrefixCache) -> None:
    base = _add(cache, CONVERSATION[:8])
    cache.settle(cache.reserve(base, 10), 0)
    again = cache.reserve(base, 5)
    assert (again.segment, again.offset) == (base.slices[0].segment, 8)
    cache.settle(again, 2)
    assert base.slices[0].segment.used == 10


def test_a_new_segment_of_which_nothing_was_written_is_dropped(cache: PrefixCache) -> None:
    cache.settle(cache.reserve(Prefix(), 10), 0)
    assert cache.size_bytes == 0
    assert _segments(cache) == []


def test_a_segment_that_nobody_holds_and_no_name_leads_to_is_dropped(cache: PrefixCache) -> None:
    promised = cache.reserve(Prefix(), 10)
    _write(promised, CONVERSATION, 10)
    held = Prefix((promised,))
    cache.pin(held)
    cache.settle(promised, 10)
    assert _segments(cache) == [promised.segment]
    cache.release(held)
    assert (_segments(cache), cache.size_bytes) == ([], 0)


def test_publishing_again_changes_nothing(cache: PrefixCache) -> None:
    """Two that computed the same blocks at once: the second finds them named and both stay right."""
    chain = _chain(CONVERSATION)
    held = []
    for _ in range(2):
        promised = cache.reserve(Prefix(), 30)
        _write(promised, CONVERSATION, 30)
        held.append(Prefix((promised,)))
        cache.publish(chain, held[-1], 0, 30)
        cache.settle(promised, 30)
    found = cache.acquire(chain, 30)
    assert found == held[0]
    cache.check_integrity()


def test_the_least_recently_used_goes_first_and_pinned_ones_never(metrics: CountingMetrics) -> None:
    cache = _small_cache(3 * (10 + MIN_SLACK_TOKENS))
    conversations = [tuple(range(start, start + 10)) for start in (0, 20, 40, 60)]
    pinned = _add(cache, conversations[0])
    for tokens in conversations[1:3]:
        cache.release(_add(cache, tokens))
    cache.release(cache.acquire(_chain(conversations[1]), 10))
    cache.release(_add(cache, conversations[3]))
    assert [cache.acquire(_chain(tokens), 10).tokens for tokens in conversations] == [10, 10, 0, 10]
    _check(pinned, conversations[0])


def test_a_descendant_goes_before_its_ancestor() -> None:
    """A segment whose beginning is gone is of no use, so the deeper one of a chain leaves first."""
    tokens = tuple(index % 251 for index in range(400))
    cache = _small_cache(10 + MIN_SLACK_TOKENS + 390 + MIN_SLACK_TOKENS)
    for end in (10, 400, 400):
        cache.release(_add(cache, tokens[:end]))
    cache.release(_add(cache, (99,) * 10))
    assert cache.acquire(_chain(tokens), 400).tokens == 10


def test_more_in_use_than_fits_overruns_the_budget_until_it_is_released() -> None:
    cache = _small_cache(5)
    one, other = _add(cache, CONVERSATION), _add(cache, (99, *CONVERSATION))
    assert cache.size_bytes > 5 * TOKEN_BYTES
    _check(one, CONVERSATION)
    _check(other, (99, *CONVERSATION))
    cache.release(one)
    cache.release(other)
    assert cache.size_bytes == 0


def test_segments_lie_in_the_memory_of_the_budget_however_their_lengths_mix() -> None:
    """What fits the budget in bytes may fit no gap between segments: more go, so that nothing lies outside it."""
    layout = KVLayout(layers=1, kv_heads=1, head_dim=512, dtype="float32")  # a token takes a page
    cache = PrefixCache(
        layout, budget_bytes=4000 * layout.bytes_per_token, device=torch.device("cpu"), metrics=CountingMetrics()
    )
    pool, drawn, chains = cache._pool._memory, Random(0), list[BlockChain]()
    for conversation in range(200):
        tokens = list(conversation.to_bytes(2)) * drawn.choice([20, 100, 300])
        chains.append(_chain(tokens))
        promised = cache.reserve(Prefix(), len(tokens))
        cache.publish(chains[-1], Prefix((promised,)), 0, len(tokens))
        cache.settle(promised, len(tokens))
        for chain in drawn.sample(chains, min(3, len(chains))):  # so that neighbours do not leave together
            cache.release(cache.acquire(chain, len(chain)))
    low, high = pool.data_ptr(), pool.data_ptr() + pool.numel()
    assert all(low <= segment.data.data_ptr() < high for segment in _segments(cache))
    assert cache.size_bytes > 0.6 * cache.budget_bytes
    cache.check_integrity()


def test_for_a_piece_of_memory_those_leave_that_adjoin_and_not_all_that_were_used_before() -> None:
    cache = _small_cache(8 * (BLOCK_TOKENS + MIN_SLACK_TOKENS))
    chains = [_chain([number] * BLOCK_TOKENS) for number in range(8)]
    for chain in chains:
        cache.release(_add(cache, chain.tokens))
    for number in (1, 3, 5, 0, 7, 2, 6, 4):
        cache.release(cache.acquire(chains[number], BLOCK_TOKENS))
    cache.reserve(Prefix(), 2 * BLOCK_TOKENS + MIN_SLACK_TOKENS)  # as large as two of them
    left = [number for number, chain in enumerate(chains) if cache.acquire(chain, BLOCK_TOKENS).tokens]
    assert left == [2, 4, 5, 6, 7], "1 and 3 for their bytes, then 0, which lies beside 1"
    cache.check_integrity()


def test_what_only_led_through_a_segment_that_left_leaves_with_it() -> None:
    cache = _small_cache(1000)
    tokens = tuple(index % 251 for index in range(300))
    for end in (10, 300):
        cache.release(_add(cache, tokens[:end]))
    ancestor, descendant = _segments(cache)
    assert ancestor.start < descendant.start
    with cache._lock:
        cache._drop(ancestor)
    assert cache.size_bytes == 0
    assert not _segments(cache)
    cache.check_integrity()


def test_pinned_bytes_are_those_of_segments_that_have_holders(cache: PrefixCache, metrics: CountingMetrics) -> None:
    assert cache.pinned_bytes == 0
    held = _add(cache, CONVERSATION)
    assert cache.pinned_bytes == cache.size_bytes > 0
    cache.pin(held)
    promised = cache.reserve(held, 300)  # no room in place: a segment of its own
    assert cache.pinned_bytes == metrics.pinned_bytes() == cache.size_bytes > held.slices[0].segment.size_bytes
    cache.settle(promised, 0)
    assert cache.pinned_bytes == cache.size_bytes == held.slices[0].segment.size_bytes, "kept nothing, so it is gone"
    cache.release(held)
    assert cache.pinned_bytes > 0, "one of two holders is left"
    cache.release(held)
    assert (cache.pinned_bytes, metrics.pinned_bytes()) == (0, 0)
    assert cache.size_bytes > 0, "resident all the same"


def test_dropped_blocks_leave_no_names_behind() -> None:
    """A system prompt outlives thousands of conversations; names of theirs that stayed with it would pile up."""
    system = tuple(range(100, 116))
    small = _small_cache(16 + 2 * MIN_SLACK_TOKENS + 16 + 150)
    held = _add(small, system)
    for start in range(0, 100, 10):
        small.release(_add(small, (*system, *([start] * 150))))
    named = [name for names in small._names.values() for name in names]
    assert set(named) == set(small._index)
    assert len(small._names[held.slices[0].segment]) <= 4 + 150 // BLOCK_TOKENS + 1
    small.check_integrity()


def test_counters_say_what_was_found_and_what_was_dropped(cache: PrefixCache, metrics: CountingMetrics) -> None:
    cache.release(_add(cache, CONVERSATION))
    assert metrics.counts["prefix bytes"] == cache.size_bytes
    cache.acquire(_chain(CONVERSATION), 20)
    assert metrics.counts["resident tokens"] == 20
    small = PrefixCache(LAYOUT, budget_bytes=0, device=torch.device("cpu"), metrics=metrics)
    small.release(_add(small, CONVERSATION))
    assert metrics.counts["evicted segments"] == 1
    assert metrics.counts["prefix bytes"] == 0


def looked_up(cache: PrefixCache, metrics: CountingMetrics, tokens: Sequence[int]) -> tuple[int, int, int]:
    """Tokens that one look-up counts as resident, as dropped and as missed."""
    before = metrics.counts.copy()
    cache.release(cache.acquire(_chain(tokens), len(tokens)))
    resident, dropped, missed = (
        metrics.counts[f"{what} tokens"] - before[f"{what} tokens"] for what in ("resident", "dropped", "missed")
    )
    return resident, dropped, missed


def test_what_was_dropped_and_is_looked_up_again_is_told_from_what_never_was_there(metrics: CountingMetrics) -> None:
    cache = _small_cache(30 + MIN_SLACK_TOKENS, metrics)
    other = tuple(range(50, 80))
    cache.release(_add(cache, CONVERSATION))
    assert looked_up(cache, metrics, (*CONVERSATION, 31, 32)) == (30, 0, 2)
    assert looked_up(cache, metrics, other) == (0, 0, 30)
    cache.release(_add(cache, other))
    assert looked_up(cache, metrics, (*CONVERSATION, 31, 32)) == (0, 28, 4), "in whole blocks"
    assert looked_up(cache, metrics, CONVERSATION[:9]) == (0, 8, 1)
    cache.release(_add(cache, CONVERSATION))
    assert looked_up(cache, metrics, CONVERSATION) == (30, 0, 0)
    assert looked_up(cache, metrics, other) == (0, 28, 2)
    cache.check_integrity()


def test_of_a_prefix_that_stayed_only_what_followed_it_counts_as_dropped(metrics: CountingMetrics) -> None:
    cache = _small_cache(10 + MIN_SLACK_TOKENS + 390 + MIN_SLACK_TOKENS, metrics)
    tokens = tuple(index % 251 for index in range(400))
    for end in (10, 400, 400):
        cache.release(_add(cache, tokens[:end]))
    cache.release(_add(cache, (99,) * 10))
    assert looked_up(cache, metrics, tokens) == (10, 390, 0)


def test_a_look_up_hashes_each_tail_once(cache: PrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else uses the cache waits for it."""
    hashed: list[tuple[int, int]] = []
    tail = BlockChain.tail

    def note(chain: BlockChain, block: int, count: int) -> BlockHash:
        hashed.append((block, count))
        return tail(chain, block, count)

    monkeypatch.setattr(BlockChain, "tail", note)
    assert cache.acquire(_chain(CONVERSATION), 30).tokens == 0
    assert hashed == [(0, 3), (0, 2), (0, 1)]


def test_no_more_names_of_dropped_blocks_are_kept_than_is_said(
    metrics: CountingMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "REMEMBERED_BLOCKS", 3)
    cache = _small_cache(0, metrics)
    for first in (0, 20):
        cache.release(_add(cache, range(first, first + 12)))
    assert looked_up(cache, metrics, range(12)) == (0, 0, 12)
    assert looked_up(cache, metrics, range(20, 32)) == (0, 12, 0)


@pytest.mark.parametrize("damage", ["bytes", "pinned bytes", "dropped", "gone", "unwritten"])
def test_books_that_do_not_balance_are_noticed(cache: PrefixCache, damage: str) -> None:
    prefix = _add(cache, CONVERSATION)
    cache.check_integrity()
    match damage:
        case "bytes":
            cache._size_bytes += 1
        case "pinned bytes":
            cache._pinned_bytes += 1
        case "dropped":
            cache._dropped[_chain(CONVERSATION).full[0]] = None
        case "gone":
            cache._size_bytes = 0
            del cache._names[prefix.slices[0].segment]
        case "unwritten":
            prefix.slices[0].segment.used = 1
    with pytest.raises(RuntimeError, match=r"counts|gone|beyond"):
        cache.check_integrity()


# --- any order of everything ------------------------------------------------------------------------------------------


@dataclass
class Holder:
    """What a sequence does with the cache: acquire, reserve and write in turns, publish, settle, release."""

    tokens: tuple[int, ...]
    acquired: Prefix
    base: Prefix
    promised: list[KVSlice] = field(default_factory=list)
    views: list[Prefix] = field(default_factory=list)

    @property
    def room(self) -> int:
        return self.promised[-1].end - self.base.tokens if self.promised else 0


holders = st.integers(0, 99)


class PrefixCacheMachine(RuleBasedStateMachine):
    @initialize(budget=st.sampled_from([0, 140, 300, 600, 5000]))
    def begin(self, budget: int) -> None:
        self.cache = _small_cache(budget)
        self.holders: list[Holder] = []

    def _pick(self, index: int) -> Holder:
        return self.holders[index % len(self.holders)]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), repeat=st.sampled_from([1, 1, 9]), cut=holders)
    def acquire(self, tokens: list[int], repeat: int, cut: int) -> None:
        sequence = tuple(tokens * repeat)
        limit = len(sequence) - cut % 3 if len(sequence) > 3 else len(sequence)
        prefix = self.cache.acquire(_chain(sequence), limit)
        assert prefix.tokens <= limit
        _check(prefix, sequence)
        self.holders.append(Holder(sequence, prefix, prefix))

    @precondition(lambda self: self.holders)
    @rule(index=holders, more=st.integers(1, 12))
    def reserve(self, index: int, more: int) -> None:
        holder = self._pick(index)
        if holder.room:
            return
        missing = max(0, holder.base.tokens + more - len(holder.tokens))
        holder.tokens += tuple((index + offset) % 2 for offset in range(missing))
        promised = self.cache.reserve(holder.base, more)
        assert (promised.start, promised.tokens) == (holder.base.tokens, more)
        holder.promised.append(promised)

    @precondition(lambda self: self.holders)
    @rule(index=holders, count=st.integers(1, 12))
    def write(self, index: int, count: int) -> None:
        holder = self._pick(index)
        count = min(count, holder.room)
        if count:
            last = holder.promised[-1]
            new = KVSlice(last.segment, last.offset + last.tokens - holder.room, count)
            _write(new, holder.tokens, count)
            holder.base = holder.base.append(new)

    @precondition(lambda self: self.holders)
    @rule(index=holders)
    def publish(self, index: int) -> None:
        holder = self._pick(index)
        start, end = holder.acquired.tokens, holder.base.tokens
        if end <= start:
            return
        chain = _chain(holder.tokens)
        self.cache.publish(chain, holder.base, start, end)
        self.cache.pin(holder.base)
        holder.views.append(holder.base)
        found = self.cache.acquire(chain, end)
        assert found.tokens == end
        _check(found, holder.tokens)
        self.cache.release(found)

    @precondition(lambda self: self.holders)
    @rule(index=holders)
    def finish(self, index: int) -> None:
        holder = self._pick(index)
        self.holders.remove(holder)
        for view in holder.views:
            self.cache.release(view)
        for promised in holder.promised:
            written = max(0, min(holder.base.tokens, promised.end) - promised.start)
            self.cache.settle(promised, written)
        self.cache.release(holder.acquired)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        pinned = sum(
            len(holder.acquired.slices) + len(holder.promised) + sum(len(view.slices) for view in holder.views)
            for holder in self.holders
        )
        assert _pins(self.cache) == pinned

    @invariant()
    def readers_see_what_they_were_given(self) -> None:
        for holder in getattr(self, "holders", ()):
            _check(holder.base, holder.tokens)
            for part in (*holder.acquired.slices, *holder.promised, *(s for view in holder.views for s in view.slices)):
                assert part.segment in self.cache._names

    @invariant()
    def nothing_idle_is_kept_beyond_the_budget(self) -> None:
        if hasattr(self, "cache") and self.cache.size_bytes > self.cache.budget_bytes:
            assert all(segment.pins for segment in _segments(self.cache))

    @invariant()
    def no_position_belongs_to_two_writers(self) -> None:
        taken: set[tuple[int, int]] = set()
        for holder in getattr(self, "holders", ()):
            for part in holder.promised:
                positions = {(id(part.segment), part.offset + index) for index in range(part.tokens)}
                assert not taken & positions
                taken |= positions

    def teardown(self) -> None:
        while getattr(self, "holders", None):
            self.finish(0)
            self.books_balance()
            self.nothing_idle_is_kept_beyond_the_budget()


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
