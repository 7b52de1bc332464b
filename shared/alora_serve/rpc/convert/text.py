"""Texts on the wire: UTF-8, which has no halves of surrogate pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alora_serve.errors import InvalidRequestError


@contextmanager
def sendable_texts(field: str) -> Iterator[None]:
    """Around the making of a message; ``field`` is its path, or that of its texts.

    Raises:
        InvalidRequestError: a text cannot be sent. Python decodes bytes that are not UTF-8 to halves of surrogate
            pairs where it reads a command line.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidRequestError.of(field, f"is not UTF-8: {error}") from error
