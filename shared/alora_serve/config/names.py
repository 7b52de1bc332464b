"""What settings are called: in the environment, as flags, and which of them are secret."""

from __future__ import annotations

from typing import Final

from alora_serve.config.groups import ENV_PREFIX, GROUPS

SECRET_NAMES: Final = frozenset({"handle_secrets", "store_secrets", "tenant_salt"})
"""Settings whose values are never shown, and which are never flags: every user of a machine can read those."""


def known_names() -> frozenset[str]:
    """Names of all settings of all groups."""
    return frozenset(name for group in GROUPS for name in group.model_fields)


def env_name(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def flag_name(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")
