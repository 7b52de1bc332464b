"""Settings of the router."""

from __future__ import annotations

from functools import partial
from typing import Final

from adapter_router.access.authentication import Access, ApiKeys, Authenticator, JwtRules, Jwts, read_jwks
from adapter_router.access.quotas import Quotas
from adapter_router.access.rules import read_rules
from adapter_router.admission import RouterLimits
from adapter_router.demands import Demands
from adapter_router.endpoints.endpoint import EndpointOptions
from alora_serve.config import PrefillSettings, RouterSettings, SecretSettings, ServerSettings, ShareSettings
from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import ConfigError
from alora_serve.kv.fingerprints import PrefixFingerprints
from alora_serve.kv.tenancy import TenantSalts

LOOK_SECONDS: Final = 1.0
"""How often the files of keys are looked at, at most: every call asks for what they say."""


class Settings(ServerSettings, SecretSettings, PrefillSettings, ShareSettings, RouterSettings):
    """The public API: picks endpoints by adapter and forwards their streams."""

    def endpoint_options(self) -> EndpointOptions:
        """How endpoints are found and filled."""
        return EndpointOptions(
            load_factor=self.bounded_load_factor,
            resolve_seconds=self.resolve_seconds,
            silence_seconds=self.silence_seconds,
        )

    def limits(self) -> RouterLimits:
        """Bounds on requests."""
        return RouterLimits(
            max_attempts=self.max_attempts,
            max_in_flight=self.max_in_flight,
            tenant_share=self.tenant_share,
            silence_seconds=self.silence_seconds,
            resume_wait_seconds=self.resume_wait_seconds,
            default_deadline_seconds=self.default_deadline_seconds,
        )

    def demands(self) -> Demands:
        """What calls need of endpoints; prefixes are named as the services of this deployment name them."""
        return Demands(PrefixFingerprints(self.tenant_salt.get_secret_value().encode()))

    def salts(self) -> TenantSalts:
        """What keeps tenants apart, as in the services of this deployment."""
        return TenantSalts(self.tenant_salt.get_secret_value().encode())

    def access(self) -> tuple[Access, Quotas]:
        """Who may call, and how much.

        Raises:
            ConfigError: a file cannot be read, or tenants cannot be kept apart.
        """
        authenticators: list[Authenticator] = []
        quotas = Quotas()
        if self.access_file is not None:
            rules = Reloaded([self.access_file], partial(read_rules, self.access_file), look_seconds=LOOK_SECONDS)
            authenticators.append(ApiKeys(rules))
            quotas = Quotas(lambda: rules.content)
        if self.jwks_file is not None:
            if not (self.jwt_issuer and self.jwt_audience):
                raise ConfigError("jwks_file needs jwt_issuer and jwt_audience: whose tokens, and meant for whom")
            wanted = JwtRules(self.jwt_issuer, self.jwt_audience, self.jwt_tenant_claim, self.jwt_roles_claim)
            keys = Reloaded([self.jwks_file], partial(read_jwks, self.jwks_file), look_seconds=LOOK_SECONDS)
            authenticators.append(Jwts(keys, wanted))
        if authenticators:
            self.salts().of("any")
        return Access(*authenticators, admin_methods=self.admin_methods), quotas

    def check_endpoints(self) -> None:
        """Return if there is someone to talk to.

        Raises:
            ConfigError: no endpoint of one of the services is given.
        """
        for name, targets in (
            ("base_prefill_endpoints", self.base_prefill_endpoints),
            ("decode_endpoints", self.decode_endpoints),
        ):
            if not targets:
                raise ConfigError(f"{name} is empty: give host:port of each service, or dns:///name:port")
