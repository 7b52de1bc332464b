"""Each tenant has a salt that only the deployment can work out."""

from __future__ import annotations

import pytest

from alora_serve.errors import ConfigError
from alora_serve.kv.tenancy import NO_TENANT, TenantSalts


def test_tenants_and_deployments_have_salts_of_their_own() -> None:
    salts = {TenantSalts(secret).of(tenant) for secret in (b"one", b"two") for tenant in ("acme", "acme2", "beta")}
    assert len(salts) == 6
    assert TenantSalts(b"one").of("acme") == TenantSalts(b"one").of("acme")
    assert all(len(salt) == 32 for salt in salts)


def test_without_a_tenant_there_is_no_salt() -> None:
    assert TenantSalts(b"one").of("") == TenantSalts(b"").of("") == NO_TENANT


def test_without_a_secret_no_tenant_is_served() -> None:
    with pytest.raises(ConfigError, match="tenant_salt is empty"):
        TenantSalts(b"").of("acme")
