"""Token ids on the wire: little-endian uint32, four bytes a token, in a bytes field."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from alora_serve.errors import InvalidRequestError
from alora_serve.types import TokenIds

TOKEN_BYTES: Final = 4


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """The ids as bytes, the same on every machine."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_token_ids(packed: bytes, field: str) -> TokenIds:
    """The ids in ``packed``; ``field`` names it in the error.

    Raises:
        InvalidRequestError: the length is not a multiple of four.
    """
    if len(packed) % TOKEN_BYTES:
        raise InvalidRequestError.of(field, f"{len(packed)} bytes are not whole packed tokens of {TOKEN_BYTES} bytes")
    return struct.unpack(f"<{len(packed) // TOKEN_BYTES}I", packed)
