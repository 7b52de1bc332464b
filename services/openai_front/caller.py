"""Who makes a request: its key and its id, from its headers."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from fastapi import Request
from starlette.types import Scope

from alora_serve.errors import UnauthenticatedError

_STATE: Final = "alora.caller"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(frozen=True, slots=True)
class Caller:
    """What a router is told of a caller.

    Attributes:
        authorization: the header, empty where there is none.
        request_id: the caller's where it is fit to be logged, else a new one.
    """

    authorization: str
    request_id: str

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> Self:
        """From headers, their names in lower case."""
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        return cls(headers.get("authorization", ""), request_id)

    @classmethod
    def of(cls, request: Request) -> Self:
        """Who makes this request."""
        caller: Self = request.scope[_STATE]
        return caller

    def attach(self, scope: Scope) -> None:
        """For :meth:`of`."""
        scope[_STATE] = self

    @property
    def api_key(self) -> str | None:
        """What the router judges.

        Raises:
            UnauthenticatedError: something else than a bearer's key is shown, or one that no header can carry on.
        """
        if not self.authorization:
            return None
        scheme, _, key = self.authorization.partition(" ")
        if scheme.lower() != "bearer" or not (key.isascii() and key.isprintable()):
            raise UnauthenticatedError("show a key as `Authorization: Bearer KEY`")
        return key.strip() or None
