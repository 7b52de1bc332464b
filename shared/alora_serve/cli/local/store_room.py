"""Where the embedded store goes and how much room it gets, decided before any service opens it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from alora_serve.errors import ConfigError
from alora_serve.kv.factory import lmdb_root
from alora_serve.kv.lmdb import disk_location
from alora_serve.kv.store_url import public_url

COMFORTABLE_BYTES: Final = 256 << 20
"""Less room than this in shared memory (a container's default is 64 MiB) sends the default store to disk."""

LEAST_BYTES: Final = 32 << 20
"""Less than this holds no conversation worth keeping."""

USABLE_SHARE: Final = 0.7
"""Of the free room; the store itself takes up to three quarters, the rest is for its copies on write and for others."""


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A store that fits: its URL, its budget in bytes, and what the user should know about either."""

    url: str
    budget_bytes: int
    notices: tuple[str, ...] = ()


def place_store(url: str, budget_bytes: int) -> StorePlace:
    """Fit an LMDB store to the room there is. Other stores have budgets of their own and pass unchanged.

    Raises:
        ConfigError: the directory cannot be written, or has no room.
    """
    if not url.startswith("lmdb:"):
        return StorePlace(url, budget_bytes)
    root = lmdb_root(url)
    notices: list[str] = []
    if url == "lmdb:" and _room_bytes(root) < COMFORTABLE_BYTES:
        disk = disk_location()
        notices.append(
            f"{root.parent} has room for {_mib(_room_bytes(root))} only, so the store goes to {disk}, which is slower"
        )
        url, root = f"lmdb://{disk}", disk
    room_bytes = _room_bytes(root)
    if room_bytes < LEAST_BYTES:
        raise ConfigError(
            f"no room for the store in {root}: {_mib(room_bytes)} can be used, {_mib(LEAST_BYTES)} are the least; "
            "free some, or pass --store lmdb:///another/directory or --store redis://host:port/0"
        )
    if room_bytes < budget_bytes:
        notices.append(f"the store's budget is lowered from {_mib(budget_bytes)} to {_mib(room_bytes)}, to fit {root}")
        budget_bytes = room_bytes
    return StorePlace(url, budget_bytes, tuple(notices))


def shown_store(url: str) -> str:
    """Where a store is, for people: the directory of an LMDB store, or a URL without its password."""
    return f"LMDB in {lmdb_root(url)}" if url.startswith("lmdb:") else public_url(url)


def _room_bytes(root: Path) -> int:
    """What a store in ``root`` may occupy: a share of what is free and of what it has already."""
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"the store cannot be written to {root}: no permission in {existing}")
    own_bytes = sum(path.stat().st_blocks * 512 for path in root.glob("*/data.mdb"))
    return int((shutil.disk_usage(existing).free + own_bytes) * USABLE_SHARE)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20:,} MiB"
