"""Settings of the router."""

from __future__ import annotations

from adapter_router.demands import Demands
from adapter_router.endpoints.endpoint import EndpointOptions
from adapter_router.servicer import RouterLimits
from alora_serve.config import RouterSettings, SecretSettings, ServerSettings
from alora_serve.errors import ConfigError
from alora_serve.kv.fingerprints import PrefixFingerprints


class Settings(ServerSettings, SecretSettings, RouterSettings):
    """The public API: picks endpoints by adapter and forwards their streams."""

    def endpoint_options(self) -> EndpointOptions:
        """How endpoints are found and filled."""
        return EndpointOptions(load_factor=self.bounded_load_factor, resolve_seconds=self.resolve_seconds)

    def limits(self) -> RouterLimits:
        """Bounds on requests."""
        return RouterLimits(
            max_attempts=self.max_attempts,
            max_in_flight=self.max_in_flight,
            default_deadline_seconds=self.default_deadline_seconds,
        )

    def demands(self) -> Demands:
        """What calls need of endpoints; prefixes are named as the services of this deployment name them."""
        return Demands(PrefixFingerprints(self.tenant_salt.get_secret_value().encode()))

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
