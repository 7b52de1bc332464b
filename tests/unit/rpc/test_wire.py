"""The string that is not UTF-8 is found by its path, and damaged bytes never make the search fail."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.rpc.wire import find_invalid_utf8
from alora_serve.v1 import alora_pb2, types_pb2

DESCRIPTOR = alora_pb2.GenerateRequest.DESCRIPTOR
MARK = "needle"


def request(**parts: Any) -> bytes:
    """A serialized request whose one ``needle`` is not UTF-8."""
    return alora_pb2.GenerateRequest(**parts).SerializeToString().replace(MARK.encode(), b"need\xff\xfe")


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (request(adapter=MARK), "adapter"),
        (
            request(sampling=types_pb2.SamplingParams(max_tokens=1, temperature=0.5, stop=["a", "b", MARK])),
            "sampling.stop[2]",
        ),
        (
            request(
                prompt=types_pb2.Prompt(messages=[types_pb2.Message(role="user"), types_pb2.Message(content=MARK)])
            ),
            "prompt.messages[1].content",
        ),
        (
            request(prompt=types_pb2.Prompt(template_arguments={"a": MARK})),
            "prompt.template_arguments.fields[0].value.string_value",
        ),
    ],
)
def test_the_bad_string_is_named_by_its_path(data: bytes, path: str) -> None:
    with pytest.raises(DecodeError):
        alora_pb2.GenerateRequest.FromString(data)
    assert find_invalid_utf8(DESCRIPTOR, data) == path


def test_bytes_fields_and_unknown_fields_may_hold_anything() -> None:
    data = alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(token_ids=b"\xff\xfe\xff\xfe")).SerializeToString()
    assert find_invalid_utf8(DESCRIPTOR, data + b"\xfa\x7f\x02\xff\xfe") is None


@pytest.mark.parametrize(
    "data",
    [
        b"\x12",  # a tag without its length
        b"\x12\x05ab",  # longer than what is left
        b"\x0b",  # a group
        b"\xff" * 11,  # a number without an end
    ],
)
def test_what_is_not_protobuf_has_no_path(data: bytes) -> None:
    assert find_invalid_utf8(DESCRIPTOR, data) is None


def nested(depth: int) -> bytes:
    """A request with a template argument of lists in lists, whose innermost string is not UTF-8."""
    value = _field(3, b"\xff")  # Value.string_value
    for _ in range(depth):
        value = _field(6, _field(1, value))  # Value.list_value, ListValue.values
    return _field(1, _field(4, _field(1, _field(1, b"k") + _field(2, value))))


def test_nesting_is_followed_as_deep_as_protobuf_reads() -> None:
    path = find_invalid_utf8(DESCRIPTOR, nested(2))
    assert path == "prompt.template_arguments.fields[0].value.list_value.values[0].list_value.values[0].string_value"
    assert find_invalid_utf8(DESCRIPTOR, nested(2000)) is None


def test_a_string_cut_off_in_a_character_is_not_blamed() -> None:
    data = alora_pb2.GenerateRequest(adapter="é").SerializeToString()
    assert find_invalid_utf8(DESCRIPTOR, data[:-1]) is None


def _field(number: int, content: bytes) -> bytes:
    length, encoded = len(content), b""
    while length > 0x7F:
        encoded += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([length]) + content


@given(st.binary(max_size=64))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    find_invalid_utf8(DESCRIPTOR, data)
