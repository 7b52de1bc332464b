"""A parser that allocates too much fails, whatever it allocates with and whatever it makes of being refused."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fuzz_targets.target import ALLOCATION_BYTES, Target

MUCH = ALLOCATION_BYTES + (8 << 20)


def by_python(data: bytes) -> None:
    bytearray(MUCH)


def by_numpy(data: bytes) -> None:
    np.zeros(MUCH, np.uint8)


def bit_by_bit(data: bytes) -> None:
    held = [bytes(1 << 20) for _ in range(MUCH >> 20)]
    held.clear()


def by_torch(data: bytes) -> None:
    torch.empty(16 * MUCH, dtype=torch.uint8)  # more than this process can have left over from before


@pytest.mark.parametrize("parse", [by_python, by_numpy, bit_by_bit])
def test_a_parser_that_allocates_too_much_fails(parse: Callable[[bytes], None]) -> None:
    with pytest.raises((AssertionError, MemoryError)):
        Target(parse, ()).run(b"")


@pytest.mark.skipif(sys.platform != "linux", reason="the system bounds memory on Linux alone")
def test_so_does_one_that_allocates_outside_python() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        Target(by_torch, ()).run(b"")


def test_a_parser_within_the_bound_does_not_and_what_it_lets_through_passes() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    Target(lambda data: bytearray(ALLOCATION_BYTES // 2), ()).run(b"")  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        Target(lambda data: 1 / 0, ()).run(b"")  # type: ignore[arg-type,return-value]
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
