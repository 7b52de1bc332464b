"""A request is parsed, or refused by field: too large before anything is parsed, unreadable afterwards."""

from __future__ import annotations

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.decoding import Refused, refusing
from alora_serve.v1 import alora_pb2, types_pb2

LIMIT_BYTES = 1000
Request = alora_pb2.GenerateRequest


def serialized(size: int) -> bytes:
    """A request of so many bytes in one turn of the user."""
    overhead = len(_request("x" * 200).SerializeToString()) - 200
    data = _request("x" * (size - overhead)).SerializeToString()
    assert len(data) == size
    return data


def _request(text: str) -> Request:
    return Request(prompt=types_pb2.Prompt(messages=[types_pb2.Message(role="user", content=text)]))


def refusal(data: bytes) -> InvalidRequestError:
    read = refusing(Request.FromString, lambda: LIMIT_BYTES)(data)
    assert isinstance(read, Refused)
    return read.error


def test_a_request_up_to_the_limit_is_read() -> None:
    read = refusing(Request.FromString, lambda: LIMIT_BYTES)
    assert read(serialized(LIMIT_BYTES)) == Request.FromString(serialized(LIMIT_BYTES))
    assert isinstance(read(serialized(LIMIT_BYTES + 1)), Refused)


def test_what_is_too_large_is_refused_by_its_largest_field_and_both_sizes() -> None:
    error = refusal(serialized(2000))
    [violation] = error.violations
    assert violation.field == "prompt.messages[0].content"
    assert str(error).startswith("prompt.messages[0].content: has 19")
    assert "of the request's 2000 bytes" in violation.description
    assert "may have 1000" in violation.description


def test_what_is_too_large_is_never_parsed() -> None:
    parsed: list[bytes] = []

    class Message:
        DESCRIPTOR = Request.DESCRIPTOR

        @classmethod
        def FromString(cls, data: bytes) -> Request:  # noqa: N802
            parsed.append(data)
            return Request.FromString(data)

    read = refusing(Message.FromString, lambda: LIMIT_BYTES)
    read(serialized(LIMIT_BYTES + 1))
    assert parsed == []
    read(serialized(LIMIT_BYTES))
    assert len(parsed) == 1


def test_the_limit_is_that_of_the_moment() -> None:
    limits = iter([100, 1000])
    read = refusing(Request.FromString, lambda: next(limits))
    assert isinstance(read(serialized(500)), Refused)
    assert isinstance(read(serialized(500)), Request)


def test_too_many_bytes_that_are_no_message_are_refused_without_a_field() -> None:
    error = refusal(b"\xff" * 2000)
    assert "2000" in str(error)
    assert "1000" in str(error)
    assert error.violations == ()


def test_what_protobuf_cannot_read_is_refused_by_name() -> None:
    error = refusal(Request(adapter="needle").SerializeToString().replace(b"needle", b"need\xff\xfe"))
    assert [violation.field for violation in error.violations] == ["adapter"]
    assert "alora_serve.v1.GenerateRequest" in str(refusal(b"\xff\xff"))
