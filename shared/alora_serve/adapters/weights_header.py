"""What a safetensors file says that it holds, read without mapping the file.

A file that is mapped and cut meanwhile ends the process (SIGBUS): who writes into an adapter root would end a worker.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from alora_serve.errors import AdapterRefusedError

MAX_HEADER_BYTES: Final = 16 << 20
"""About 80,000 tensors; the adapters of mixtures of experts have the most."""

_LENGTH_BYTES: Final = 8
_MOST_DIMENSIONS: Final = 8

SERVED_DTYPES: Final[Mapping[str, int]] = {"F32": 4, "BF16": 2, "F16": 2}
"""What a weights file may hold, by safetensors' names, and the bytes of a number. Of others no extent is checked."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype, by safetensors' name, and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: BinaryIO) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file by name. The file is at its beginning afterwards.

    Raises:
        AdapterRefusedError: it is not valid: cut, say, also while it is read.
        OSError: it cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(_exactly(file, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    try:
        header = json.loads(_exactly(file, length))
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its header is not JSON: {type(error).__name__}") from error
    file.seek(0)
    if not isinstance(header, dict):
        raise _damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    specs, spans = {}, []
    for name, entry in header.items():
        specs[name], span = _parsed(name, entry)
        spans.append(span)
    end = 0
    for begin, until in sorted(spans):
        if begin != end:
            raise _damaged(f"its tensors overlap or leave a gap at byte {min(begin, end)}")
        end = until
    held = size - _LENGTH_BYTES - length
    if end != held:
        raise _damaged(f"its tensors take {end} bytes, but it holds {held}")
    return specs


def _exactly(file: BinaryIO, count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise _damaged(f"it ends {count - len(content)} bytes before its header does")
    return content


def _parsed(name: str, entry: object) -> tuple[TensorSpec, tuple[int, int]]:
    """A tensor and where its bytes begin and end, behind the header."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end))
            and len(shape) <= _MOST_DIMENSIONS
        ):
            width = SERVED_DTYPES.get(dtype)
            if begin <= end and (width is None or end - begin == width * math.prod(shape)):
                return TensorSpec(dtype, tuple(shape)), (begin, end)
    raise _damaged(f"tensor {name} is not described, or its shape and its place disagree")


def _damaged(problem: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"the weights file is not valid safetensors: {problem}")
