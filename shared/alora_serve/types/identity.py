"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["generate", "admin"]
"""``generate``: everything that answers about conversations. ``admin``: what changes the service for others."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller. ``tenant`` is empty where the deployment has none."""

    tenant: str
    roles: frozenset[Role]


ANYONE: Final = Identity("", frozenset({"generate", "admin"}))
"""Every caller of a deployment without access control."""
