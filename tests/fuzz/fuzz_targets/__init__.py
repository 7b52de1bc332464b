"""Everything that parses bytes from outside, each as a function that takes any bytes at all.

A target returns, or raises :class:`AssertionError` where something was taken that must not be, or any other exception
where the parser let one through. Errors that a parser promises are part of it working.
"""

from __future__ import annotations

from typing import Final

from fuzz_targets import clients, conversations, files, http, store
from fuzz_targets.target import Target

TARGETS: Final[dict[str, Target]] = {
    **store.TARGETS,
    **clients.TARGETS,
    **conversations.TARGETS,
    **http.TARGETS,
    **files.TARGETS,
}
"""By the name that ``make fuzz`` knows them by."""
