"""Finds the string in a serialized message that is not UTF-8, which protobuf's own error does not name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_DEPTH: Final = 100
"""As deep as protobuf itself reads."""

_MAX_VARINT_BITS: Final = 63


class _MalformedError(Exception):
    """The bytes are not protobuf at all."""


def find_invalid_utf8(descriptor: Descriptor, data: bytes) -> str | None:
    """The path (``sampling.stop[2]``) of the first string in ``data`` that is not UTF-8.

    None when there is none before the end of the message or the first byte that is not protobuf. Never raises.
    """
    try:
        return _search(descriptor, memoryview(data), MAX_DEPTH)
    except _MalformedError:
        return None


def _search(descriptor: Descriptor, data: memoryview, depth: int) -> str | None:
    if depth == 0:
        raise _MalformedError
    seen: dict[int, int] = {}
    for number, value in _length_delimited(data):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            continue
        index = seen[number] = seen.get(number, -1) + 1
        path = f"{field.name}[{index}]" if field.is_repeated else field.name
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(value):
            return path
        if field.message_type is not None:
            inner = _search(field.message_type, value, depth - 1)
            if inner is not None:
                return f"{path}.{inner}"
    return None


def _is_utf8(value: memoryview) -> bool:
    try:
        str(value, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _length_delimited(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Field number and content of each field with a length; the others are passed over."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        match tag & 7:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:
                length, position = _varint(data, position)
                if position + length > len(data):
                    raise _MalformedError
                yield tag >> 3, data[position : position + length]
                position += length
            case 5:
                position += 4
            case _:
                raise _MalformedError


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The value at ``position`` and the position after it."""
    value = 0
    for shift in range(0, _MAX_VARINT_BITS + 1, 7):
        if position >= len(data):
            raise _MalformedError
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError
