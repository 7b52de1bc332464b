"""Finds in a serialized message, without parsing it, the string that is not UTF-8 and the field that makes it large."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_DEPTH: Final = 100
"""As deep as protobuf itself reads."""

MAX_FIELDS: Final = 20_000
"""Fields looked at: tens of milliseconds. A message of a million crumbs must not hold up the event loop."""

_MAX_VARINT_BITS: Final = 63
_LENGTH_DELIMITED: Final = 2
_NOTHING: Final = memoryview(b"")
_UNPACKABLE: Final = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)


class _MalformedError(Exception):
    """The bytes are not protobuf, or not of a kind worth reading."""


def find_invalid_utf8(descriptor: Descriptor, data: bytes) -> str | None:
    """The path (``sampling.stop[2]``) of the first string in ``data`` that is not UTF-8.

    None when there is none before the end of the message, the first byte that is not protobuf, or the end of the first
    :data:`MAX_FIELDS`. Never raises.
    """
    try:
        return _search(descriptor, memoryview(data), MAX_DEPTH, iter(range(MAX_FIELDS)))
    except _MalformedError:
        return None


def _search(descriptor: Descriptor, data: memoryview, depth: int, left: Iterator[int]) -> str | None:
    if depth == 0:
        raise _MalformedError
    seen: dict[int, int] = {}
    for number, wire_type, value, _ in _fields(data):
        if next(left, None) is None:
            raise _MalformedError
        field = descriptor.fields_by_number.get(number)
        if field is None or wire_type != _LENGTH_DELIMITED:
            continue
        index = seen[number] = seen.get(number, -1) + 1
        path = f"{field.name}[{index}]" if field.is_repeated else field.name
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(value):
            return path
        if field.message_type is not None:
            inner = _search(field.message_type, value, depth - 1, left)
            if inner is not None:
                return f"{path}.{inner}"
    return None


def _is_utf8(value: memoryview) -> bool:
    try:
        str(value, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class FieldSize:
    """A field by its path, and the bytes it takes with its tags; a repeated one without an index is all elements."""

    path: str
    size_bytes: int


def find_largest_field(descriptor: Descriptor, data: bytes) -> FieldSize | None:
    """What makes ``data`` large: the innermost field with more than half of it, else the largest of the outermost.

    Fields that the message does not have go by their number. None when nothing in ``data`` is protobuf. Never raises.
    Copies nothing and looks at :data:`MAX_FIELDS` at most: an inner message of more is named as a whole; of the
    outermost, what was looked at decides.
    """
    found: FieldSize | None = None
    message: Descriptor | None = descriptor
    content, prefix, left, depth = memoryview(data), "", MAX_FIELDS, MAX_DEPTH
    while message is not None and depth:
        depth -= 1
        sizes, num_read = _field_sizes(content, left)
        left -= num_read
        if not sizes or (found and not left):
            break
        number, size = max(sizes.items(), key=lambda item: item[1].total_bytes)
        if found and size.total_bytes * 2 <= len(data):
            break
        field = message.fields_by_number.get(number)
        path = prefix + (field.name if field else str(number))
        found = FieldSize(path, size.total_bytes)
        if field is None or len(size.largest) * 2 <= len(data):
            break
        if field.is_repeated and field.type in _UNPACKABLE:
            path = f"{path}[{size.largest_index}]"
            found = FieldSize(path, len(size.largest))
        message, content, prefix = field.message_type, size.largest, f"{path}."
    return found


@dataclass(slots=True)
class _Size:
    """All occurrences of one field number."""

    count: int = 0
    total_bytes: int = 0
    largest: memoryview = _NOTHING
    largest_index: int = 0


def _field_sizes(data: memoryview, limit: int) -> tuple[dict[int, _Size], int]:
    """Sizes by field number, up to the first byte that is not protobuf, and how many fields were read for them."""
    sizes: defaultdict[int, _Size] = defaultdict(_Size)
    num_read = 0
    try:
        for number, _, content, size_bytes in _fields(data):
            if num_read == limit:
                break
            num_read += 1
            size = sizes[number]
            if len(content) > len(size.largest):
                size.largest, size.largest_index = content, size.count
            size.count += 1
            size.total_bytes += size_bytes
    except _MalformedError:
        pass  # what stands before it is enough to tell
    return sizes, num_read


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview, int]]:
    """Number, wire type and content of each field, and its bytes with tag and length."""
    position = 0
    while position < len(data):
        first = position
        tag, position = _varint(data, position)
        start = position
        match tag & 7:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:
                length, start = _varint(data, position)
                position = start + length
            case 5:
                position += 4
            case _:
                raise _MalformedError
        if position > len(data):
            raise _MalformedError
        yield tag >> 3, tag & 7, data[start:position], position - first


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
