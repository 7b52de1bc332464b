"""Settings of the front door."""

from __future__ import annotations

from pydantic import Field

from alora_serve.config import FrontDoorSettings, ServerSettings
from alora_serve.errors import ConfigError
from alora_serve.rpc.channels import is_this_machine
from alora_serve.rpc.tls import ClientTls


class Settings(ServerSettings, FrontDoorSettings):
    """OpenAI's API over HTTP, translated to the gRPC API of a router."""

    listen: str = Field("127.0.0.1:8000", description="host:port of the HTTP server; port 0 takes a free one.")

    def router_tls(self) -> ClientTls | None:
        """How to speak to the router; None: in plain text, which may not leave this machine unless that is allowed.

        Raises:
            ConfigError: it would, or half of a certificate is given.
        """
        if bool(self.router_tls_cert_file) != bool(self.router_tls_key_file):
            raise ConfigError("router_tls_cert_file and router_tls_key_file go together")
        if self.router_tls_ca_file:
            return ClientTls(
                self.router_tls_ca_file,
                self.router_tls_cert_file,
                self.router_tls_key_file,
                self.router_tls_server_name,
                settings="router_tls",
            )
        if self.router_tls_cert_file:
            raise ConfigError("router_tls_cert_file needs router_tls_ca_file: certificates are shown over TLS alone")
        if not (self.allow_insecure or is_this_machine(self.router_address)):
            raise ConfigError(
                f"router_address={self.router_address}: anyone on the network could read keys and conversations; set "
                "router_tls_ca_file, or allow_insecure where something else protects them"
            )
        return None
