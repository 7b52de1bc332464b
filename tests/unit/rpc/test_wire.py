"""A string that is not UTF-8 and the largest field are found by their path; damaged bytes never make that fail."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.rpc.wire import MAX_FIELDS, FieldSize, find_invalid_utf8, find_largest_field
from alora_serve.v1 import alora_pb2, types_pb2

DESCRIPTOR = alora_pb2.GenerateRequest.DESCRIPTOR
NESTING = alora_pb2.RunIntrinsicRequest.DESCRIPTOR
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
        (request(prompt=types_pb2.Prompt(tools_json=["{}", MARK])), "prompt.tools_json[1]"),
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
    """A request for an intrinsic with a parameter of lists in lists, whose innermost string is not UTF-8."""
    value = _field(3, b"\xff")  # Value.string_value
    for _ in range(depth):
        value = _field(6, _field(1, value))  # Value.list_value, ListValue.values
    return _field(3, _field(1, _field(1, b"k") + _field(2, value)))


def test_nesting_is_followed_as_deep_as_protobuf_reads() -> None:
    path = find_invalid_utf8(NESTING, nested(2))
    assert path == "parameters.fields[0].value.list_value.values[0].list_value.values[0].string_value"
    assert find_invalid_utf8(NESTING, nested(2000)) is None


def test_a_string_cut_off_in_a_character_is_not_blamed() -> None:
    data = alora_pb2.GenerateRequest(adapter="é").SerializeToString()
    assert find_invalid_utf8(DESCRIPTOR, data[:-1]) is None


def _field(number: int, content: bytes) -> bytes:
    length, encoded = len(content), b""
    while length > 0x7F:
        encoded += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([length]) + content


def user(text: str) -> types_pb2.Message:
    return types_pb2.Message(role="user", content=text)


def with_prompt(**parts: Any) -> alora_pb2.GenerateRequest:
    return alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(**parts), sampling=types_pb2.SamplingParams(stop=["a"]))


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (alora_pb2.GenerateRequest(adapter="x" * 1000), "adapter"),
        (with_prompt(messages=[user("a"), user("x" * 1000)]), "prompt.messages[1].content"),
        (with_prompt(messages=[user("x" * 100)] * 10), "prompt.messages"),
        (with_prompt(token_ids=b"\0" * 1000), "prompt.token_ids"),
        (with_prompt(messages=[user("x" * 300)], token_ids=b"\0" * 500), "prompt.token_ids"),
        (with_prompt(messages=[user("x" * 300)], token_ids=b"\0" * 300, tools_json=["x" * 300]), "prompt"),
        (with_prompt(tools_json=["{}", "x" * 500]), "prompt.tools_json[1]"),
        (
            alora_pb2.GenerateRequest(sampling=types_pb2.SamplingParams(stop_token_ids=range(1000))),
            "sampling.stop_token_ids",
        ),
        (
            alora_pb2.GenerateRequest(adapter="x" * 400, sampling=types_pb2.SamplingParams(stop=["x" * 200] * 2)),
            "sampling",
        ),
        (
            alora_pb2.GenerateRequest(
                prompt=types_pb2.Prompt(token_ids=b"\0" * 300),
                adapter="x" * 310,
                resume=types_pb2.Resume(generated_token_ids=b"\0" * 305),
            ),
            "adapter",
        ),
    ],
)
def test_the_field_that_makes_a_message_large_is_named_by_its_path(
    message: alora_pb2.GenerateRequest, path: str
) -> None:
    found = find_largest_field(DESCRIPTOR, message.SerializeToString())
    assert found is not None
    assert found.path == path


def test_a_large_field_comes_with_its_bytes() -> None:
    message = with_prompt(messages=[user("x" * 100)] * 10)
    # Each message: tag and length; role: both and "user"; content: both and its text.
    assert find_largest_field(DESCRIPTOR, message.SerializeToString()) == FieldSize(
        "prompt.messages", 10 * (2 + 6 + 102)
    )


def test_a_large_field_of_a_later_version_goes_by_its_number() -> None:
    data = _field(15, b"\xff" * 100) + request(adapter="a")
    assert find_largest_field(DESCRIPTOR, data) == FieldSize("15", 102)


def test_what_stands_before_the_damage_is_measured() -> None:
    data = alora_pb2.GenerateRequest(adapter="x" * 100).SerializeToString()
    assert find_largest_field(DESCRIPTOR, data + b"\x0b") == FieldSize("adapter", 102)
    assert find_largest_field(DESCRIPTOR, b"\x0b" + data) is None


def test_a_message_of_crumbs_does_not_hold_up_the_loop() -> None:
    crumbs = with_prompt(messages=[types_pb2.Message()] * (MAX_FIELDS + 1)).SerializeToString()
    started = time.perf_counter()
    many = find_largest_field(DESCRIPTOR, crumbs * 100)
    assert many is not None
    assert many.path == "prompt", "its bytes are all here, wherever in it they are"
    targets = _field(2, b"") * 10_000_000
    outermost = find_largest_field(alora_pb2.FanOutRequest.DESCRIPTOR, targets)
    assert outermost == FieldSize("targets", 2 * MAX_FIELDS), "of those looked at"
    assert find_invalid_utf8(alora_pb2.FanOutRequest.DESCRIPTOR, targets + _field(2, _field(1, b"\xff"))) is None
    assert time.perf_counter() - started < 5, "all ten million take longer"


def test_nesting_is_measured_as_deep_as_protobuf_reads() -> None:
    found = find_largest_field(NESTING, nested(2000))
    assert found is not None
    assert found.path.startswith("parameters.fields[0].value.list_value.values[0].list_value")


@given(st.binary(max_size=64))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    find_invalid_utf8(DESCRIPTOR, data)
    find_largest_field(DESCRIPTOR, data)
