"""How tokens and adapters are named."""

from __future__ import annotations

from typing import NewType

AdapterDigest = NewType("AdapterDigest", str)
"""Lower-case hex SHA-256 of an adapter's config and weights: its identity. Names are for people."""

TokenIds = tuple[int, ...]
