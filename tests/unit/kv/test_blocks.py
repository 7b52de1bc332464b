"""What comes back from a store is the KV that went in, bit for bit, or a counted miss, whatever befell the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv import layout as layout_module
from alora_serve.kv.blocks import BlockStore
from alora_serve.kv.keys import BlockChain, BlockHash, part_key
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.record import HEADER_BYTES
from alora_serve.kv.store import StoreKey
from alora_serve.kv.transfer import FetchResult, StoredBlock, StoreTiming
from faulty_store import FaultyStore
from in_process import CountingMetrics

torch.set_num_threads(1)

BLOCK_TOKENS = 4
LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=2, dtype="bfloat16")
ONE_LAYER_BLOCK_BYTES = BLOCK_TOKENS * LAYOUT.bytes_per_layer_token
ROOT = BlockHash(b"r" * 32)
TOKENS = tuple(range(100, 118))  # four full blocks and a tail of two
TIMING = StoreTiming(base_seconds=2.0, bytes_per_second=1000.0)


def _kv_of(token_count: int) -> Tensor:
    """The one KV of so many positions, different everywhere: ``[layers, 2, kv_heads, tokens, head_dim]``."""
    generator = torch.Generator().manual_seed(5)
    shape = (LAYOUT.layers, 2, LAYOUT.kv_heads, 64, LAYOUT.head_dim)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)[:, :, :, :token_count]


@dataclass
class Memory:
    """KV of positions ``[start, start + tokens)``, as source in two pieces and as destination."""

    data: Tensor
    start: int = 0
    _under_way: list[tuple[int, range, Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, start: int, end: int) -> Memory:
        shape = (LAYOUT.layers, 2, LAYOUT.kv_heads, end - start, LAYOUT.head_dim)
        return cls(torch.full(shape, float("nan"), dtype=torch.bfloat16), start)

    @property
    def end(self) -> int:
        return self.start + self.data.shape[3]

    def view(self, start: int, end: int) -> Tensor:
        assert self.start <= start < end <= self.end
        return self.data[:, :, :, start - self.start : end - self.start]

    def write(self, start: int, layers: range, values: Tensor) -> None:
        self._under_way.append((start, layers, values.clone()))

    def finish(self) -> None:
        """Nothing is here before, as on a GPU."""
        for start, layers, values in self._under_way:
            self.view(start, start + values.shape[3])[layers.start : layers.stop] = values
        self._under_way.clear()

    def pieces(self, start: int, end: int) -> Iterator[tuple[Tensor, int]]:
        middle = (start + end) // 2
        for low, high in ((start, middle), (middle, end)):
            if low < high:
                yield self.view(low, high), low - start


@dataclass
class Bench:
    """A block store over a store that can fail."""

    store: FaultyStore
    blocks: BlockStore
    metrics: CountingMetrics

    def chain(self, tokens: tuple[int, ...] = TOKENS) -> BlockChain:
        return BlockChain(ROOT, tokens, self.blocks._block_tokens)

    def write(self, tokens: tuple[int, ...] = TOKENS) -> list[StoredBlock]:
        listed = self.blocks.blocks(self.chain(tokens), 0)
        self.blocks.write(listed, Memory(_kv_of(len(tokens))))
        return listed

    def write_tail(self, end: int) -> StoreKey:
        """Store just the tail that ends there; returns its key."""
        block = self.blocks.blocks(self.chain(TOKENS[:end]), 0)[-1]
        self.blocks.write([block], Memory(_kv_of(len(TOKENS))))
        return part_key(block.name, 0)

    def fetch(
        self, start: int = 0, end: int = len(TOKENS), tokens: tuple[int, ...] = TOKENS
    ) -> tuple[FetchResult, Memory]:
        """Fetch and see that what is said to be there equals the original bit for bit."""
        target = Memory.empty(start, end)
        result = self.blocks.fetch(self.chain(tokens), target)
        assert start <= result.end <= end
        if result.end > start:
            original = Memory(_kv_of(len(tokens))).view(start, result.end)
            assert torch.equal(target.view(start, result.end).view(torch.int16), original.view(torch.int16))
        for reason, blocks in result.misses.items():
            assert self.metrics.counts[f"miss {reason}"] >= blocks
        return result, target


def _bench() -> Bench:
    store, metrics = FaultyStore(), CountingMetrics()
    blocks = BlockStore(store, layout=LAYOUT, block_tokens=BLOCK_TOKENS, timing=TIMING, metrics=metrics)
    return Bench(store, blocks, metrics)


@pytest.fixture
def bench() -> Bench:
    return _bench()


@pytest.fixture
def parts_bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Blocks of three parts, a layer each."""
    monkeypatch.setattr(layout_module, "PART_BYTES", ONE_LAYER_BLOCK_BYTES)
    return _bench()


def _keys(block: StoredBlock, parts: int = 1) -> list[StoreKey]:
    return [part_key(block.name, part) for part in range(parts)]


def _flip(store: FaultyStore, key: StoreKey, position: int = HEADER_BYTES) -> None:
    value = bytearray(store.values[key])
    value[position] ^= 1
    store.values[key] = bytes(value)


# --- good stores ------------------------------------------------------------------------------------------------------


def test_what_was_written_comes_back_whole(bench: Bench) -> None:
    written = bench.write()
    result, _ = bench.fetch()
    assert result.end == len(TOKENS)
    assert result.fetched_bytes == len(TOKENS) * LAYOUT.bytes_per_token
    assert result.present == {block.name for block in written}
    assert result.misses == {}
    assert bench.store.calls["contains"] == 0


def test_blocks_of_several_parts_come_back_whole(parts_bench: Bench) -> None:
    written = parts_bench.write()
    assert len(parts_bench.store.values) == 3 * len(written)
    assert parts_bench.fetch()[0].end == len(TOKENS)


def test_an_empty_store_is_nothing_but_misses(bench: Bench) -> None:
    result, _ = bench.fetch()
    assert (result.end, result.fetched_bytes, result.misses) == (0, 0, {"absent": 5})
    assert bench.metrics.counts["miss absent"] == 5


def test_the_tail_alone_is_marked_to_be_evicted_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[bool] = []
    monkeypatch.setattr(bench.store, "put_many", lambda puts, **_: marks.extend(put.evict_first for put in puts))
    bench.write()
    assert marks == [False, False, False, False, True]


def test_listed_blocks_hold_the_positions_asked_for(bench: Bench) -> None:
    listed = [(block.start, block.end) for block in bench.blocks.blocks(bench.chain(), 5)]
    assert listed == [(4, 8), (8, 12), (12, 16), (16, 18)]
    assert bench.blocks.blocks(bench.chain(), 18) == []
    assert bench.blocks.blocks(bench.chain(TOKENS[:16]), 16) == []


@given(start=st.integers(0, 17), length=st.integers(1, 18), stored=st.integers(1, 18))
def test_any_range_is_fetched_from_any_stored_beginning(start: int, length: int, stored: int) -> None:
    """The first block may be resident in part, the last reach beyond the limit, and more be asked than there is."""
    bench = _bench()
    bench.write(TOKENS[:stored])
    end = min(start + length, len(TOKENS))
    result, target = bench.fetch(start, end)
    in_tail = stored % BLOCK_TOKENS and stored != len(TOKENS)
    usable = stored - stored % BLOCK_TOKENS if in_tail and stored > end else stored  # a tail is taken whole
    assert result.end == max(start, min(end, usable))
    assert target.view(start, end).isnan().any(dim=4).any(dim=0).any(dim=0).any(dim=0).tolist()[
        result.end - start :
    ] == [True] * (end - result.end)


def test_a_limit_inside_a_block_takes_part_of_it(bench: Bench) -> None:
    written = bench.write()
    result, _ = bench.fetch(end=6)
    assert result.end == 6
    assert result.present == {written[0].name, written[1].name}


def test_the_rest_of_a_partly_resident_block_is_taken(bench: Bench) -> None:
    bench.write()
    result, _ = bench.fetch(start=6)
    assert result.end == len(TOKENS)


# --- holes and damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hole", range(5))
def test_a_hole_ends_the_run_and_nothing_after_it_moves_up(bench: Bench, hole: int) -> None:
    """Filtering missing blocks out of a list would shift those after it: wrong KV under right positions."""
    written = bench.write()
    del bench.store.values[_keys(written[hole])[0]]
    result, _ = bench.fetch()
    assert result.end == written[hole].start
    assert result.misses == {"absent": 1}
    assert result.present == {block.name for block in written[:hole]}
    assert result.fetched_bytes == written[hole].start * LAYOUT.bytes_per_token


@pytest.mark.parametrize("position", [0, 20, 79, HEADER_BYTES, HEADER_BYTES + 100])
def test_a_corrupt_block_is_a_miss_and_is_deleted(bench: Bench, position: int) -> None:
    written = bench.write()
    key = _keys(written[2])[0]
    _flip(bench.store, key, position)
    result, _ = bench.fetch()
    assert (result.end, result.misses) == (8, {"corrupt": 1})
    assert bench.metrics.counts["miss corrupt"] == 1
    assert key not in bench.store.values
    assert len(bench.store.values) == len(written) - 1
    bench.write()
    assert bench.fetch()[0].end == len(TOKENS)


def test_a_value_that_changes_while_it_is_copied_is_a_miss(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the file that it lies in is cut, and extended again by somebody else."""
    block = bench.write()[2]
    [key] = _keys(block)
    value = bytearray(bench.store.values[key])
    monkeypatch.setitem(bench.store.values, key, value)
    write = Memory.write

    def cut_meanwhile(self: Memory, start: int, layers: range, values: Tensor) -> None:
        if start == block.start:
            value[HEADER_BYTES:] = bytes(len(value) - HEADER_BYTES)
        write(self, start, layers, values)

    monkeypatch.setattr(Memory, "write", cut_meanwhile)
    result, _ = bench.fetch()
    assert (result.end, result.misses) == (block.start, {"corrupt": 1})


def test_a_truncated_value_is_a_miss_and_is_deleted(bench: Bench) -> None:
    key = _keys(bench.write()[0])[0]
    bench.store.values[key] = bench.store.values[key][:-1]
    assert bench.fetch()[0].misses == {"corrupt": 1}
    assert key not in bench.store.values


def test_the_value_of_another_block_is_a_miss(bench: Bench) -> None:
    """Well-formed, right size, right checksum, wrong place: only the key inside the record tells."""
    written = bench.write()
    first, second = _keys(written[0])[0], _keys(written[1])[0]
    bench.store.values[first] = bench.store.values[second]
    assert (bench.fetch()[0].end, first in bench.store.values) == (0, False)


def test_a_record_of_another_version_is_a_miss_and_is_left_to_those_who_read_it(bench: Bench) -> None:
    key = _keys(bench.write()[1])[0]
    _flip(bench.store, key, 4)
    result, _ = bench.fetch()
    assert (result.end, result.misses) == (4, {"version": 1})
    assert key in bench.store.values


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("damage", ["absent", "corrupt"])
def test_one_bad_part_makes_the_whole_block_a_miss(parts_bench: Bench, part: int, damage: str) -> None:
    written = parts_bench.write()
    keys = _keys(written[1], parts=3)
    if damage == "absent":
        del parts_bench.store.values[keys[part]]
    else:
        _flip(parts_bench.store, keys[part])
    result, _ = parts_bench.fetch()
    assert (result.end, result.misses) == (4, {damage: 1})
    assert result.present == {written[0].name}
    # Of a corrupt block all parts go: what wrote one wrongly may have written the others.
    left = [key in parts_bench.store.values for key in keys]
    assert left == ([False] * 3 if damage == "corrupt" else [other != part for other in range(3)])


def test_a_corrupt_block_that_cannot_be_deleted_is_still_only_a_miss(bench: Bench) -> None:
    _flip(bench.store, _keys(bench.write()[0])[0])
    bench.store.faults["delete", 0] = StoreUnavailableError("gone")
    result, _ = bench.fetch()
    assert (result.end, result.misses) == (0, {"corrupt": 1})


# --- tails ------------------------------------------------------------------------------------------------------------


def test_a_longer_conversation_uses_the_tail_that_a_shorter_one_left(bench: Bench) -> None:
    bench.write(TOKENS[:6])
    result, _ = bench.fetch()
    assert result.end == 6
    assert result.fetched_bytes == 6 * LAYOUT.bytes_per_token
    assert len(result.present) == 2


def test_the_longest_tail_wins_and_all_are_asked_for_at_once(bench: Bench) -> None:
    bench.write(TOKENS[:4])
    keys = [bench.write_tail(end) for end in (5, 6, 7)]
    assert bench.fetch()[0].end == 7
    assert bench.store.asked == [keys[::-1]]
    del bench.store.values[keys[2]]
    assert bench.fetch()[0].end == 6


def test_tails_are_tried_only_where_they_reach_beyond_what_is_there(bench: Bench) -> None:
    bench.write(TOKENS[:6])
    result, _ = bench.fetch(start=6, end=7)
    assert result.end == 6
    assert bench.store.asked == [[part_key(bench.chain().tail(1, 3), 0)]]


def test_a_tail_beyond_the_limit_is_not_asked_for(bench: Bench) -> None:
    bench.write(TOKENS[:4])
    bench.write_tail(7)
    assert bench.fetch(end=6)[0].end == 4
    assert len(bench.store.asked[0]) == 2


def test_a_corrupt_tail_is_a_miss_and_is_deleted(bench: Bench) -> None:
    key = bench.write_tail(3)
    _flip(bench.store, key)
    result, _ = bench.fetch(end=4)
    assert (result.end, result.misses) == (0, {"absent": 1, "corrupt": 1})
    assert key not in bench.store.values


def test_a_tail_that_is_gone_when_it_is_read_is_a_miss(bench: Bench) -> None:
    bench.store.absent.add(bench.write_tail(3))
    result, _ = bench.fetch(end=4)
    assert (result.end, result.misses) == (0, {"absent": 2})


def test_the_exact_tail_is_not_asked_for_again_after_it_was_bad(bench: Bench) -> None:
    """It was read already: looking it up once more would count its miss twice and hide the shorter ones."""
    shorter = bench.write_tail(17)
    exact = bench.write_tail(18)
    _flip(bench.store, exact, 4)  # another version: rejected and left there
    for tail in (shorter, exact):
        assert tail in bench.store.values
    bench.write(TOKENS[:16])
    result, _ = bench.fetch()
    assert (result.end, result.misses) == (17, {"version": 1})


def test_a_tail_of_which_a_part_is_gone_is_a_miss(parts_bench: Bench) -> None:
    parts_bench.write(TOKENS[:6])
    tail = parts_bench.blocks.blocks(parts_bench.chain(TOKENS[:6]), 4)[0]
    del parts_bench.store.values[_keys(tail, parts=3)[2]]
    assert parts_bench.fetch()[0].end == 4


# --- stores that fail -------------------------------------------------------------------------------------------------

FAILURES = [
    (StoreUnavailableError("refused"), "unavailable"),
    (StoreTimeoutError("slow"), "timeout"),
    (StoreError("odd"), "unavailable"),
]


@pytest.mark.parametrize(("error", "reason"), FAILURES)
@pytest.mark.parametrize("before", range(6))
def test_what_arrived_before_a_failure_is_used(bench: Bench, error: StoreError, reason: str, before: int) -> None:
    written = bench.write()
    bench.store.faults["get", 0] = error
    bench.store.values_before_fault = before
    result, _ = bench.fetch()
    assert result.end == ([0] + [block.end for block in written])[before]
    assert result.misses == ({reason: 5 - before} if before < 5 else {})
    # Nothing more is asked of a store that just failed.
    assert bench.store.calls["contains"] == 0


def test_nothing_is_under_way_after_an_error_that_is_no_stores(bench: Bench) -> None:
    """The caller gives the memory back then, and the next holder must not be written over."""
    bench.write()
    memory = Memory.empty(0, len(TOKENS))
    bench.store.faults["get", 0] = MemoryError("a defect")  # type: ignore[assignment]
    bench.store.values_before_fault = 2
    with pytest.raises(MemoryError):
        bench.blocks.fetch(bench.chain(), memory)
    assert not memory._under_way
    assert not memory.data[:, :, :, :8].isnan().any(), "two blocks had arrived"


@pytest.mark.parametrize(("error", "reason"), FAILURES)
def test_a_failing_look_up_of_tails_costs_the_tail_alone(bench: Bench, error: StoreError, reason: str) -> None:
    bench.write(TOKENS[:6])
    bench.store.faults["contains", 0] = error
    result, _ = bench.fetch()
    assert (result.end, result.misses) == (4, {"absent": 4, reason: 1})


def test_time_to_fetch_grows_with_the_bytes_asked_for(bench: Bench) -> None:
    bench.write()
    bench.store.timeouts.clear()
    bench.fetch()
    record_bytes = 5 * HEADER_BYTES + len(TOKENS) * LAYOUT.bytes_per_token
    assert bench.store.timeouts == [("get", 2.0 + record_bytes / 1000.0)]


@pytest.mark.parametrize(("error", "reason"), [*FAILURES, (StoreFullError("full"), "full")], ids=str)
@pytest.mark.parametrize("call", range(5))
def test_blocks_from_a_failed_write_on_are_dropped_and_counted(
    bench: Bench, error: StoreError, reason: str, call: int
) -> None:
    bench.store.faults["put", call] = error
    listed = bench.blocks.blocks(bench.chain(), 0)
    result = bench.blocks.write(listed, Memory(_kv_of(len(TOKENS))))
    assert result.stored_bytes == listed[call].start * LAYOUT.bytes_per_token
    assert result.drops == {reason: 5 - call}
    assert bench.metrics.counts[f"drop {reason}"] == 5 - call
    assert bench.store.calls["put"] == call + 1
    assert bench.fetch()[0].end == listed[call].start


def test_a_write_that_failed_between_parts_leaves_no_block(parts_bench: Bench) -> None:
    parts_bench.store.faults["put", 1] = StoreFullError("full")
    parts_bench.store.values_before_fault = 2
    parts_bench.write()
    assert parts_bench.fetch()[0].end == 4


def test_a_write_has_one_deadline_for_all_its_blocks(bench: Bench) -> None:
    bench.write()
    given_seconds = [seconds for _, seconds in bench.store.timeouts]
    assert given_seconds == sorted(given_seconds, reverse=True)
    assert given_seconds[0] <= 2.0 + len(TOKENS) * LAYOUT.bytes_per_token / 1000.0


def test_writing_nothing_asks_nothing(bench: Bench) -> None:
    assert bench.blocks.write([], Memory(_kv_of(1))).stored_bytes == 0
    assert bench.blocks.missing([]) == []
    assert not bench.store.calls


def test_missing_blocks_are_those_that_lack_a_part(parts_bench: Bench) -> None:
    written = parts_bench.write()
    for block, part in ((1, 2), (3, 0)):
        del parts_bench.store.values[_keys(written[block], parts=3)[part]]
    assert parts_bench.blocks.missing(written) == [written[1], written[3]]


def test_all_blocks_count_as_missing_when_the_store_cannot_say(bench: Bench) -> None:
    written = bench.write()
    assert bench.blocks.missing(written) == []
    bench.store.faults["contains", 1] = StoreTimeoutError("slow")
    assert bench.blocks.missing(written) == written


# --- any damage -------------------------------------------------------------------------------------------------------

damages = st.lists(
    st.tuples(st.sampled_from(["drop", "flip", "cut", "swap", "other"]), st.integers(0, 99), st.integers(0, 9999)),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(
    damage=damages,
    parts=st.booleans(),
    start=st.integers(0, 17),
    failing=st.sampled_from(["", "get", "contains", "delete"]),
    before=st.integers(0, 20),
)
def test_whatever_happens_to_the_store_what_is_said_to_be_there_is_right(
    damage: list[tuple[str, int, int]], parts: bool, start: int, failing: str, before: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if parts:
            patch.setattr(layout_module, "PART_BYTES", ONE_LAYER_BLOCK_BYTES)
        bench = _bench()
        bench.write()
        for end in (3, 6, 15, 17):
            bench.write_tail(end)
        for kind, which, where in damage:
            keys = sorted(bench.store.values)
            key = keys[which % len(keys)]
            value = bytearray(bench.store.values[key] or b"\0")
            match kind:
                case "drop":
                    del bench.store.values[key]
                    continue
                case "flip":
                    value[where % len(value)] ^= 1 << where % 8
                case "cut":
                    del value[where % len(value) :]
                case "swap":
                    value = bytearray(bench.store.values[keys[where % len(keys)]])
                case "other":
                    value = bytearray(where.to_bytes(2, "little") * (len(value) // 2))
            bench.store.values[key] = bytes(value)
        if failing:
            bench.store.faults[failing, 0] = StoreTimeoutError("slow")
            bench.store.values_before_fault = before
        result, _ = bench.fetch(start)
        assert result.end - start <= sum(block.tokens for block in bench.blocks.blocks(bench.chain(), start))
        # What is left of the store after a fetch is served to the next one just as rightly.
        bench.store.faults.clear()
        again, _ = bench.fetch(start)
        assert again.end >= result.end
