"""What keeps tenants apart: a salt for each, from a secret of the deployment and the name the router authenticated."""

from __future__ import annotations

import hmac
from typing import Final

from alora_serve.errors import ConfigError

NO_TENANT: Final = b""
"""The salt of callers of a deployment without tenants, who share all blocks."""

_DOMAIN: Final = b"alora-serve tenant\0"


class TenantSalts:
    """Derives salts. The same in every process that has the secret; nobody else can name a tenant's blocks."""

    def __init__(self, secret: bytes) -> None:
        """``secret`` is the deployment's ``tenant_salt``."""
        self._secret = secret

    def of(self, tenant: str) -> bytes:
        """32 bytes for a tenant; :data:`NO_TENANT` for the empty name.

        Raises:
            ConfigError: there are tenants, but no secret: anyone could work out their salts.
        """
        if not tenant:
            return NO_TENANT
        if not self._secret:
            raise ConfigError(
                "tenant_salt is empty, and requests come for tenants: set the same secret on every service"
            )
        return hmac.digest(self._secret, _DOMAIN + tenant.encode(), "sha256")
