"""Who makes the call that runs, for whoever works on it: set once it is authorized, the same in all its tasks."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

from alora_serve.types import ANYONE, Identity

CALLER: Final[ContextVar[Identity]] = ContextVar("caller", default=ANYONE)
