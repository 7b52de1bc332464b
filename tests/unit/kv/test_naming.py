"""Conversations that begin with a prompt that the operator shares have its blocks in common across tenants."""

from __future__ import annotations

from alora_serve.kv.keys import BlockHash
from alora_serve.kv.naming import BlockNames

ROOT = BlockHash(b"r" * 32)
SHORT, LONG = tuple(range(8)), tuple(range(12))


def shared_blocks(names: BlockNames, tokens: tuple[int, ...]) -> int:
    one, other = names.chain(tokens, b"one"), names.chain(tokens, b"other")
    return sum(mine == theirs for mine, theirs in zip(one.full, other.full, strict=True))


def test_the_longest_public_prompt_counts() -> None:
    names = BlockNames(ROOT, 4, [SHORT, LONG])
    assert shared_blocks(names, (*LONG, *range(50, 70))) == 3
    assert shared_blocks(names, (*SHORT, *range(50, 70))) == 2
    assert shared_blocks(names, (0, 1, 2, 3, 99, *range(50, 70))) == 0
    assert shared_blocks(BlockNames(ROOT, 4), (*LONG, *range(50, 70))) == 0


def test_a_block_that_holds_anything_else_is_private() -> None:
    names = BlockNames(ROOT, 4, [tuple(range(10))])
    assert shared_blocks(names, tuple(range(30))) == 2


def test_without_a_tenant_everything_is_everyones() -> None:
    names = BlockNames(ROOT, 4, [SHORT])
    assert names.chain(LONG).full == BlockNames(ROOT, 4).chain(LONG).full
