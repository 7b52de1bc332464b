"""What was not sealed under its key by this deployment is no value; what was is the same as before."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_serve.errors import ConfigError
from alora_serve.kv.sealed import SealedStore
from alora_serve.kv.store import Put
from in_process import MemoryStore
from store_peer import key_of

Scheme = Literal["mac", "encrypt"]
SCHEMES = get_args(Scheme)
OLD, NEW = b"an old secret of the tests", b"a new secret of the tests"
KEY, OTHER = key_of("a"), key_of("b")
VALUE = bytes(range(256)) * 3

pytestmark = pytest.mark.parametrize("scheme", SCHEMES)


def sealed(scheme: Scheme, inner: MemoryStore, *secrets: bytes) -> SealedStore:
    return SealedStore(inner, scheme, secrets or (NEW,))


def read(store: SealedStore, key: bytes = KEY) -> bytes | None:
    found: list[bytes] = []
    store.get_many([key], lambda _, value: found.append(bytes(value)), timeout_seconds=1)  # type: ignore[list-item]
    return found[0] if found else None


def put(store: SealedStore, value: bytes = VALUE) -> None:
    store.put_many([Put(KEY, value)], timeout_seconds=1)


@settings(max_examples=30)
@given(value=st.binary(max_size=2000))
def test_a_value_comes_out_as_it_went_in(scheme: Scheme, value: bytes) -> None:
    store = sealed(scheme, MemoryStore())
    put(store, value)
    assert read(store) == value


def test_every_bit_counts(scheme: Scheme) -> None:
    inner = MemoryStore()
    store = sealed(scheme, inner)
    put(store)
    whole = inner.values[KEY]
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            inner.values[KEY] = bytes(damaged)
            assert read(store) == b""
    for end in range(len(whole)):
        inner.values[KEY] = whole[:end]
        assert read(store) == b""
    inner.values[KEY] = whole + b"\0"
    assert read(store) == b""


def test_a_value_under_another_key_is_none(scheme: Scheme) -> None:
    inner = MemoryStore()
    store = sealed(scheme, inner)
    put(store)
    inner.values[OTHER] = inner.values[KEY]
    assert read(store, OTHER) == b""


def test_a_secret_is_rotated_without_losing_what_the_old_one_sealed(scheme: Scheme) -> None:
    inner = MemoryStore()
    put(sealed(scheme, inner, OLD))
    assert read(sealed(scheme, inner, NEW, OLD)) == VALUE
    assert read(sealed(scheme, inner, NEW)) == b""
    put(sealed(scheme, inner, NEW, OLD))
    assert read(sealed(scheme, inner, NEW)) == VALUE


def test_one_scheme_does_not_open_the_other(scheme: Scheme) -> None:
    inner = MemoryStore()
    put(sealed(scheme, inner))
    [other] = {*SCHEMES} - {scheme}
    assert read(sealed(other, inner)) == b""


def test_only_encryption_hides(scheme: Scheme) -> None:
    inner = MemoryStore()
    put(sealed(scheme, inner))
    assert (VALUE in inner.values[KEY]) == (scheme == "mac")


def test_what_is_absent_stays_absent(scheme: Scheme) -> None:
    inner = MemoryStore()
    store = sealed(scheme, inner)
    assert read(store) is None
    put(store)
    assert store.contains_many([KEY, OTHER], timeout_seconds=1) == [True, False]
    store.delete_many([KEY], timeout_seconds=1)
    assert inner.values == {}


@pytest.mark.parametrize("secrets", [(), (b"short",), (NEW, b"short")])
def test_a_secret_too_short_is_refused(scheme: Scheme, secrets: tuple[bytes, ...]) -> None:
    with pytest.raises(ConfigError, match="store_secrets"):
        SealedStore(MemoryStore(), scheme, secrets)
