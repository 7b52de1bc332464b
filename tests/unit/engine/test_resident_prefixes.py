"""What routers are told of a service's memory: what is there, in bounded space, and nothing that has left."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from alora_serve.engine.resident_prefixes import ResidentPrefixes
from alora_serve.kv.fingerprints import MAX_FINGERPRINTS, STRIDE_TOKENS, PrefixFingerprints
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.types import PrefixDigest

MODEL = b"m" * 32
NAMES = PrefixFingerprints(b"salt")
ROOT = BlockHash(b"r" * 32)


class Memory:
    """A cache that holds all blocks but those that have ``left``."""

    def __init__(self) -> None:
        self.left: set[BlockHash] = set()

    def __call__(self, names: Collection[BlockHash]) -> set[BlockHash]:
        return {*names} - self.left


@pytest.fixture
def memory() -> Memory:
    return Memory()


def tell_of(memory: Memory, capacity: int = MAX_FINGERPRINTS) -> ResidentPrefixes:
    return ResidentPrefixes(memory, NAMES, MODEL, capacity=capacity)


def conversation(number: int, strides: float) -> tuple[int, ...]:
    return tuple(range(number * 100_000, number * 100_000 + int(strides * STRIDE_TOKENS)))


def chain(tokens: tuple[int, ...], block_tokens: int = 32) -> BlockChain:
    return BlockChain(ROOT, tokens, block_tokens)


def names(tokens: tuple[int, ...]) -> frozenset[int]:
    return frozenset(NAMES.of(tokens, model_digest=MODEL))


def test_nothing_is_told_before_anything_was_used(memory: Memory) -> None:
    assert tell_of(memory).digest() == PrefixDigest(STRIDE_TOKENS, frozenset())


@pytest.mark.parametrize("block_tokens", [16, 32, 45, 256, 300, 700])
def test_every_length_of_a_used_prefix_is_told(memory: Memory, block_tokens: int) -> None:
    told = tell_of(memory)
    told.note(chain(conversation(1, 3.5), block_tokens))
    told.note(chain(conversation(2, 2.9), block_tokens))
    assert told.digest().fingerprints == names(conversation(1, 3.5)) | names(conversation(2, 2.9))


def test_a_prefix_shorter_than_a_stride_or_a_block_is_not_told(memory: Memory) -> None:
    told = tell_of(memory)
    told.note(chain(conversation(1, 0.9)))
    told.note(chain(conversation(2, 1.5), block_tokens=512))
    assert not told.digest().fingerprints


def test_what_leaves_memory_is_not_told_any_more_even_when_it_was_used_last(memory: Memory) -> None:
    told, used = tell_of(memory), chain(conversation(1, 3))
    told.note(used)
    memory.left.add(used.full[-1])  # the deepest block went first
    assert told.digest().fingerprints == names(conversation(1, 2))
    memory.left.clear()
    assert told.digest().fingerprints == names(conversation(1, 2)), "only use brings a prefix back"
    told.note(used)
    assert told.digest().fingerprints == names(conversation(1, 3))


def test_a_digest_is_bounded_and_forgets_the_least_recently_used_deepest_first(memory: Memory) -> None:
    told = tell_of(memory, capacity=5)
    for number in (1, 2, 1, 3):
        told.note(chain(conversation(number, 2)))
    assert told.digest().fingerprints == names(conversation(1, 2)) | names(conversation(3, 2)) | names(
        conversation(2, 1)
    )


def test_one_prefix_beyond_the_bound_is_told_by_its_beginning(memory: Memory) -> None:
    told = tell_of(memory, capacity=4)
    told.note(chain(conversation(1, 9)))
    assert told.digest().fingerprints == names(conversation(1, 4))
    told.note(chain(conversation(1, 9)))
    assert told.digest().fingerprints == names(conversation(1, 4))


def test_a_growing_conversation_adds_only_its_new_lengths(memory: Memory) -> None:
    told = tell_of(memory)
    told.note(chain(conversation(1, 2)))
    told.note(chain(conversation(1, 4)))
    assert told.digest().fingerprints == names(conversation(1, 4))
