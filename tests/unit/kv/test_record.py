"""A stored value is exactly what its key promises, or it is rejected; nothing else can come of any bytes."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.kv.layout import KVLayout
from alora_serve.kv.record import (
    HEADER_BYTES,
    RECORD_VERSION,
    RecordRejected,
    RecordSpec,
    check_payload,
    open_record,
    payload_of,
    seal,
)
from alora_serve.kv.store import StoreKey

SPEC = RecordSpec(key=StoreKey(bytes(range(32))), layout=KVLayout(3, 2, 4, "bfloat16"), group=range(1, 3), tokens=5)
PAYLOAD = bytes(index * 7 % 251 for index in range(SPEC.payload_bytes))


def _record(spec: RecordSpec = SPEC, payload: bytes = PAYLOAD) -> bytearray:
    record = bytearray(HEADER_BYTES) + payload
    seal(spec, record)
    return record


def _reason(record: bytes | bytearray | memoryview, spec: RecordSpec = SPEC) -> str:
    with pytest.raises(RecordRejected) as caught:
        open_record(spec, record)
    assert str(caught.value)
    return caught.value.reason


def test_a_sealed_record_opens_to_its_payload_without_a_copy() -> None:
    record = _record()
    payload = open_record(SPEC, record)
    assert bytes(payload) == PAYLOAD
    record[HEADER_BYTES] ^= 1
    assert payload[0] == PAYLOAD[0] ^ 1


def test_header_and_record_have_the_sizes_that_the_format_says() -> None:
    assert HEADER_BYTES == 80
    assert SPEC.shape == (2, 2, 2, 5, 4)
    assert SPEC.payload_bytes == 2 * 2 * 2 * 5 * 4 * 2
    assert len(_record()) == SPEC.record_bytes


def test_the_format_of_this_version_does_not_change() -> None:
    """Other processes read what was written: a new layout of the same version would be corruption to them."""
    layout = KVLayout(1, 1, 1, "float32")
    record = _record(RecordSpec(StoreKey(b"k" * 32), layout, range(1), 1), b"\0\1\2\3\4\5\6\7")
    assert record.hex() == (
        "614c4b5601000100" + "6b" * 32 + "0000"
        "0100"
        "0100"
        "0100"
        "01000000"
        "0800000000000000" + "00" * 16 + "c3697ba4" + "0001020304050607"
    )


def test_only_a_buffer_of_the_right_size_is_sealed() -> None:
    with pytest.raises(ValueError, match="where the spec says"):
        seal(SPEC, bytearray(SPEC.record_bytes - 1))


def test_every_single_flipped_byte_is_rejected() -> None:
    good = bytes(_record())
    for position in range(len(good)):
        for mask in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[position] ^= mask
            assert _reason(bad) == ("version" if position in (4, 5) else "corrupt"), position


def test_a_value_that_changes_while_it_is_copied_is_rejected_after_the_copy() -> None:
    record = _record()
    payload_of(SPEC, record)
    record[HEADER_BYTES + 7 :] = bytes(len(record) - HEADER_BYTES - 7)
    with pytest.raises(RecordRejected, match="checksum"):
        check_payload(SPEC, record)


def test_every_truncation_and_every_surplus_byte_is_rejected() -> None:
    good = bytes(_record())
    for length in range(len(good)):
        assert _reason(good[:length]) == "corrupt"
    assert _reason(good + b"\0") == "corrupt"


def test_a_torn_write_is_rejected_wherever_it_tore() -> None:
    """The beginning of a new value over the end of another one, or over zeros."""
    new, old = bytes(_record()), bytes(_record(payload=PAYLOAD[::-1]))
    for length in range(len(new)):
        for rest in (old, bytes(len(new))):
            torn = new[:length] + rest[length:]
            if torn not in (new, old):
                _reason(torn)


def test_another_version_is_told_apart_from_damage() -> None:
    """Old and new releases run side by side during a rollout: that is no corruption, and nobody deletes it."""
    for version in (0, RECORD_VERSION + 1, 0xFFFF):
        record = _record()
        record[4:6] = struct.pack("<H", version)
        assert _reason(record) == "version"
        assert _reason(record[:6]) == "version"


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, key=StoreKey(b"o" * 32)),
        replace(SPEC, group=range(2)),
        replace(SPEC, layout=KVLayout(3, 4, 2, "bfloat16")),
        replace(SPEC, layout=KVLayout(3, 2, 4, "float16")),
        replace(SPEC, layout=KVLayout(3, 1, 4, "float32")),
        replace(SPEC, tokens=10, layout=KVLayout(3, 1, 4, "bfloat16")),
        replace(SPEC, tokens=4),
        replace(SPEC, group=range(1, 2)),
    ],
    ids=["key", "layers", "shape", "dtype", "wider-dtype", "tokens", "fewer-tokens", "fewer-layers"],
)
def test_a_good_record_of_something_else_is_corrupt(spec: RecordSpec) -> None:
    assert _reason(_record(), spec) == "corrupt"


@given(st.binary(max_size=300))
def test_random_bytes_are_rejected_and_nothing_worse(data: bytes) -> None:
    _reason(data)


@given(st.binary(max_size=300))
def test_random_bytes_behind_a_good_beginning_are_rejected(data: bytes) -> None:
    good = bytes(_record())
    for length in (4, 6, 76, HEADER_BYTES):
        if good[length:] != data:
            _reason(good[:length] + data)


@given(st.integers(0, SPEC.record_bytes - 1), st.binary(min_size=1, max_size=40))
def test_a_record_with_a_damaged_stretch_is_rejected(position: int, damage: bytes) -> None:
    good = _record()
    bad = bytearray(good)
    bad[position : position + len(damage)] = damage
    if bad != good:
        _reason(bad)


def test_a_view_of_another_format_is_read_as_bytes() -> None:
    """LMDB and Redis hand out views of bytes; an array of wider items is the same memory."""
    record = _record()
    assert bytes(open_record(SPEC, memoryview(record).cast("I"))) == PAYLOAD
