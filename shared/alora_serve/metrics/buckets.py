"""Bounds of histograms, in seconds: what language models and their stores take."""

from __future__ import annotations

from typing import Final

FAST_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Store calls, reading adapters and engine steps: from a look-up in memory to a long prompt's chunk."""

TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0)
"""From one token to the next: close together where people begin to notice."""

REQUEST_SECONDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0),
    *(30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Times to a first token, parts of requests and whole ones: from a warm prefix to the default deadline."""
