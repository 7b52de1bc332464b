"""Every parser, given anything at all and damaged versions of what it takes. ``make fuzz`` goes on where this ends."""

from __future__ import annotations

import random

import pytest
from fuzz_targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=600))
def test_any_bytes_are_taken_or_refused_in_words(name: str, data: bytes) -> None:
    TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_input_is_taken_or_refused_in_words(name: str, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(rng.choice(TARGETS[name].seeds))
    for _ in range(rng.randrange(1, 4)):
        match rng.randrange(4):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                at = rng.randrange(len(data) + 1)
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2 if data:
                at = rng.randrange(len(data))
                del data[at : at + rng.randrange(1, 9)]
            case _:
                data = data[: rng.randrange(len(data) + 1)]
    TARGETS[name].run(bytes(data))


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_whole_is_taken(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)
