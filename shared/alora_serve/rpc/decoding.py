"""Reads requests, and says which field is at fault where gRPC or protobuf would only say that something is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.wire import find_invalid_utf8, find_largest_field


@dataclass(frozen=True, slots=True)
class Refused:
    """Stands in for a request that was not read: a deserializer that raises is INTERNAL to gRPC, without a reason."""

    error: InvalidRequestError


def refusing(
    deserialize: Callable[[bytes], Message], max_message_bytes: Callable[[], int]
) -> Callable[[bytes], Message | Refused]:
    """The deserializer of a generated message, ``X.FromString``, that refuses instead of raising.

    Args:
        deserialize: ``X.FromString``.
        max_message_bytes: the limit now; a larger request is refused before any of it is parsed.
    """
    descriptor: Descriptor = deserialize.__self__.DESCRIPTOR  # type: ignore[attr-defined]  # the message class

    def read(data: bytes) -> Message | Refused:
        limit = max_message_bytes()
        if len(data) > limit:
            return Refused(_too_large(descriptor, data, limit))
        try:
            return deserialize(data)
        except DecodeError:
            return Refused(_undecodable(descriptor, data))

    return read


def _too_large(descriptor: Descriptor, data: bytes, limit: int) -> InvalidRequestError:
    allowed = f"a request may have {limit}, as many as the model's context can need"
    field = find_largest_field(descriptor, data)
    if field is None:
        return InvalidRequestError(f"the request has {len(data)} bytes; {allowed}")
    return InvalidRequestError.of(
        field.path, f"has {field.size_bytes} of the request's {len(data)} bytes; {allowed}: send less"
    )


def _undecodable(descriptor: Descriptor, data: bytes) -> InvalidRequestError:
    field = find_invalid_utf8(descriptor, data)
    if field is None:
        return InvalidRequestError(f"the request is not a {descriptor.full_name}")
    return InvalidRequestError.of(field, "is not UTF-8")
