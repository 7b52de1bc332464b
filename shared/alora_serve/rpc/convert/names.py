"""Names that requests give: of adapters, and of fields inside what they send."""

from __future__ import annotations

from typing import Final

from alora_serve.rpc.convert.violations import Violations

MAX_ADAPTER_NAME_BYTES: Final = 255
"""An adapter is named as its folder is, and no file system has longer names."""

_KEY_CHARACTERS: Final = 60


def check_adapter_name(name: str, violations: Violations, field: str) -> None:
    """Note a name that no adapter can have: it would be compared with all there are, and told to logs."""
    # Characters first: a name of megabytes isn't encoded to be told that it is long.
    size = len(name) if len(name) > MAX_ADAPTER_NAME_BYTES else len(name.encode())
    violations.require(
        size <= MAX_ADAPTER_NAME_BYTES, field, f"has more than {MAX_ADAPTER_NAME_BYTES} bytes: no adapter is named so"
    )


def path_to(field: str, key: str) -> str:
    """The path of what stands under ``key``, which may be as long as its sender likes."""
    return f"{field}.{key}" if len(key) <= _KEY_CHARACTERS else f"{field}.{key[:_KEY_CHARACTERS]}…"
