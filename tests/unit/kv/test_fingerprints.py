"""Short names of prefixes: the same wherever they are made, of the tokens and nothing less, and cheap."""

from __future__ import annotations

from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.kv.fingerprints import STRIDE_TOKENS, PrefixFingerprints

MODEL = b"m" * 32
NAMES = PrefixFingerprints(b"salt")
TOKENS = tuple(range(3 * STRIDE_TOKENS + 17))


@given(st.integers(0, 4 * STRIDE_TOKENS), st.integers(0, 4 * STRIDE_TOKENS))
def test_a_longer_prefix_keeps_the_names_of_a_shorter_one(one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    tokens = tuple(range(longer))
    names = NAMES.of(tokens, model_digest=MODEL)
    assert len(names) == longer // STRIDE_TOKENS
    assert names[: shorter // STRIDE_TOKENS] == NAMES.of(tokens[:shorter], model_digest=MODEL)


@pytest.mark.parametrize("position", [0, STRIDE_TOKENS - 1, STRIDE_TOKENS, 3 * STRIDE_TOKENS - 1])
def test_another_token_names_another_prefix_from_there_on(position: int) -> None:
    changed = (*TOKENS[:position], 70_000, *TOKENS[position + 1 :])
    same = [a == b for a, b in zip(*(NAMES.of(t, model_digest=MODEL) for t in (TOKENS, changed)), strict=True)]
    assert same == [index < position // STRIDE_TOKENS for index in range(3)]


def test_another_tenant_or_model_names_nothing_alike() -> None:
    mine = NAMES.of(TOKENS, model_digest=MODEL)
    assert not {*mine} & {*PrefixFingerprints(b"other salt").of(TOKENS, model_digest=MODEL)}
    assert not {*mine} & {*NAMES.of(TOKENS, model_digest=b"n" * 32)}


def test_names_are_part_of_the_protocol_between_versions() -> None:
    # Routers and workers one minor version apart must find the same: a change needs another stride_tokens.
    assert NAMES.of(range(2 * STRIDE_TOKENS), model_digest=MODEL) == (0x4141334D6F26C13B, 0x0F81D1C23DF649B3)


def test_naming_a_long_conversation_costs_a_router_less_than_a_millisecond() -> None:
    tokens = tuple(range(6144))
    seconds = []
    for _ in range(20):
        began = perf_counter()
        NAMES.of(tokens, model_digest=MODEL)
        seconds.append(perf_counter() - began)
    assert min(seconds) < 0.001
