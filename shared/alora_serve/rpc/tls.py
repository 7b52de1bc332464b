"""TLS from PEM files that are read again when they change, so that certificates are renewed without a restart."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from alora_serve.config import RouterSettings
from alora_serve.config.file_version import FileVersion, file_version
from alora_serve.config.reloaded import Reloaded
from alora_serve.rpc.certificates import expiry_seconds, read_pem


@dataclass(frozen=True, slots=True)
class _Identity:
    configuration: grpc.ServerCertificateConfiguration
    expires_at: float


class ServerTls:
    """Who a server is, and whom it lets in. Thread-safe."""

    def __init__(self, cert_file: str, key_file: str, client_ca_file: str = "") -> None:
        """Read the files.

        Args:
            cert_file: the server's certificate chain.
            key_file: the private key.
            client_ca_file: clients must show a certificate that one of these signed; empty: they need none.

        Raises:
            ConfigError: a file cannot be read, or the first holds no certificate.
        """
        self._cert_file, self._key_file, self._client_ca_file = cert_file, key_file, client_ca_file
        self._identity = Reloaded((cert_file, key_file, client_ca_file), self._read)

    def credentials(self) -> grpc.ServerCredentials:
        """For a port. New connections see what the files say then; files that cannot be read change nothing."""
        told = self._identity.content

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal told
            if (now := self._identity.content) is told:
                return None
            told = now
            return now.configuration

        # The stubs do not know that None is "as before".
        return grpc.dynamic_ssl_server_credentials(told.configuration, fetch, bool(self._client_ca_file))  # type: ignore[arg-type]

    def expires_at(self) -> float:
        """When the certificate that a new connection sees expires, in seconds since the epoch."""
        return self._identity.content.expires_at

    def _read(self) -> _Identity:
        key, chain = read_pem("tls_key_file", self._key_file), read_pem("tls_cert_file", self._cert_file)
        roots = read_pem("tls_client_ca_file", self._client_ca_file) if self._client_ca_file else None
        configuration = grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)
        return _Identity(configuration, expiry_seconds("tls_cert_file", self._cert_file))


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Whom a client trusts, and who it is.

    Attributes:
        ca_file: certificates that sign servers'.
        cert_file: its own certificate chain, for servers that ask; empty: none.
        key_file: the private key.
        server_name: the name that servers' certificates carry, where it is not the one connected to: endpoints are
            found by name and connected to by address.
        settings: what those that name the files begin with, for errors.
    """

    ca_file: str
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""
    settings: str = field(default="peer_tls", kw_only=True)

    @classmethod
    def of_peers(cls, settings: RouterSettings) -> ClientTls | None:
        """How to speak to the services of a deployment; None: in plain text."""
        if not settings.peer_tls_ca_file:
            return None
        return cls(
            settings.peer_tls_ca_file,
            settings.peer_tls_cert_file,
            settings.peer_tls_key_file,
            settings.peer_tls_server_name,
        )

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel, from the files as they are now.

        Raises:
            ConfigError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=read_pem(f"{self.settings}_ca_file", self.ca_file),
            private_key=read_pem(f"{self.settings}_key_file", self.key_file) if self.key_file else None,
            certificate_chain=read_pem(f"{self.settings}_cert_file", self.cert_file) if self.cert_file else None,
        )

    @property
    def files(self) -> tuple[str, ...]:
        """What they are read from; one that is not named is empty."""
        return self.ca_file, self.cert_file, self.key_file

    def versions(self) -> tuple[FileVersion | None, ...]:
        """Different once a file has changed."""
        return tuple(map(file_version, self.files))
