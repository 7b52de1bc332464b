"""One stored value: a fixed header that says what the bytes are, then the bytes. Verified or it is a miss.

Layout, little-endian, 80 bytes before the payload::

    magic 4s | version u16 | dtype u8 | pad u8 | key 32s | first_layer u16 | layers u16 | kv_heads u16 | head_dim u16
    | tokens u32 | payload_bytes u64 | pad 16 | crc32c u32

The CRC-32C covers the header before it and the payload. The payload is ``[layers, 2, kv_heads, tokens, head_dim]``,
contiguous, in the dtype named. A dtype or shape that is not the expected one is corruption: the key names both.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import google_crc32c
import numpy as np
from typing_extensions import Buffer

from alora_serve.kv.layout import KVLayout
from alora_serve.kv.store import StoreKey

RECORD_VERSION = 1
_MAGIC = b"aLKV"
_HEADER = struct.Struct("<4sHBx32sHHHHIQ16x")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
_DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3}

MissReason = Literal["absent", "corrupt", "version", "timeout", "unavailable"]
"""Why a block was not had from the store; the label of the misses metric."""


class RecordRejected(Exception):
    """A value that may not be used: a verdict that becomes a miss. ``reason`` is ``version`` or ``corrupt``."""

    def __init__(self, reason: MissReason, detail: str) -> None:
        super().__init__(detail)
        self.reason: MissReason = reason


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """What the value under a key must be.

    Attributes:
        key: the key it is stored under.
        layout: shape and dtype of the model's KV.
        group: the layers in this part.
        tokens: tokens in the block, fewer than ``block_tokens`` for a tail.
    """

    key: StoreKey
    layout: KVLayout
    group: range
    tokens: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``[layers of the part, 2, kv_heads, tokens, head_dim]``."""
        return (len(self.group), 2, self.layout.kv_heads, self.tokens, self.layout.head_dim)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload."""
        return len(self.group) * self.tokens * self.layout.bytes_per_layer_token

    @property
    def record_bytes(self) -> int:
        """Bytes of header and payload."""
        return HEADER_BYTES + self.payload_bytes

    def _header(self) -> bytes:
        layout = self.layout
        return _HEADER.pack(
            _MAGIC,
            RECORD_VERSION,
            _DTYPE_CODES[layout.dtype],
            self.key,
            self.group.start,
            len(self.group),
            layout.kv_heads,
            layout.head_dim,
            self.tokens,
            self.payload_bytes,
        )


def seal(spec: RecordSpec, record: bytearray) -> None:
    """Write header and checksum around a payload already in place at ``record[HEADER_BYTES:]``.

    Raises:
        ValueError: ``record`` has not exactly ``spec.record_bytes`` bytes.
    """
    if len(record) != spec.record_bytes:
        raise ValueError(f"record of {len(record)} bytes where the spec says {spec.record_bytes}")
    header = spec._header()
    record[: _HEADER.size] = header
    _CRC.pack_into(record, _HEADER.size, _checksum(header, memoryview(record)[HEADER_BYTES:]))


def open_record(spec: RecordSpec, record: Buffer) -> memoryview:
    """The payload of a value, checked against ``spec``; a view into ``record``, not a copy.

    Where ``record`` is memory that others can change, copy :func:`payload_of` it first, and check afterwards.

    Raises:
        RecordRejected: another record version, or anything that differs from what ``spec`` says or fails the checksum.
    """
    payload = payload_of(spec, record)
    check_payload(spec, record)
    return payload


def payload_of(spec: RecordSpec, record: Buffer) -> memoryview:
    """The payload of a value whose header and size are what ``spec`` says; a view, not checked yet.

    Raises:
        RecordRejected: another record version, or another header or size.
    """
    view = memoryview(record).cast("B")
    if len(view) < 6 or bytes(view[:4]) != _MAGIC:
        raise RecordRejected("corrupt", "no record magic")
    version = int.from_bytes(view[4:6], "little")
    if version != RECORD_VERSION:
        raise RecordRejected("version", f"record version {version}, this release reads {RECORD_VERSION}")
    if len(view) != spec.record_bytes:
        raise RecordRejected("corrupt", f"{len(view)} bytes, expected {spec.record_bytes}")
    if bytes(view[: _HEADER.size]) != spec._header():
        raise RecordRejected("corrupt", "header is not the one this key must have")
    return view[HEADER_BYTES:]


def check_payload(spec: RecordSpec, record: Buffer) -> None:
    """Return if the payload is the one that was sealed.

    Raises:
        RecordRejected: it fails the checksum.
    """
    view = memoryview(record).cast("B")
    (stored,) = _CRC.unpack_from(view, _HEADER.size)
    if _checksum(spec._header(), view[HEADER_BYTES:]) != stored:
        raise RecordRejected("corrupt", "checksum mismatch")


def _checksum(header: bytes, payload: memoryview) -> int:
    # The library takes bytes and arrays but no memoryviews; an array over the same memory copies nothing.
    checksum: int = google_crc32c.extend(google_crc32c.value(header), np.frombuffer(payload, dtype=np.uint8))
    return checksum
