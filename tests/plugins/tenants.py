"""Access files for tests: tenants, their quotas, and a key for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def key_of(tenant: str) -> str:
    """The API key that :func:`write_access` gives a tenant."""
    return f"key-of-{tenant}-" + "x" * 24


def write_access(
    file: Path,
    tenants: Mapping[str, Mapping[str, int]],
    *,
    roles: Sequence[str] = ("generate",),
    admins: Sequence[str] = (),
    **more: str,
) -> Path:
    """An access file: tenants with their quotas; ``admins`` are those of them whose keys may do all.

    ``more``: further keys, each of a tenant.
    """
    keys = {**{key_of(name): name for name in tenants}, **more}
    rules = {
        "tenants": {name: dict(quota) for name, quota in tenants.items()},
        "keys": [
            {
                "tenant": tenant,
                "sha256": hashlib.sha256(key.encode()).hexdigest(),
                "roles": [*roles, *(["admin"] if tenant in admins else [])],
            }
            for key, tenant in keys.items()
        ],
    }
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(rules))  # JSON is YAML
    beside.replace(file)
    return file
