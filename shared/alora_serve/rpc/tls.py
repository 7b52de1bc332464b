"""TLS from PEM files that are read again when they change, so that certificates are renewed without a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from alora_serve.config import RouterSettings
from alora_serve.config.file_version import FileVersion, file_version
from alora_serve.errors import ConfigError

_log = structlog.get_logger(__name__)


def _read(setting: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} {file}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Who a server is, and whom it lets in.

    Attributes:
        cert_file: its certificate chain.
        key_file: the private key.
        client_ca_file: clients must show a certificate that one of these signed; empty: they need none.
    """

    cert_file: str
    key_file: str
    client_ca_file: str = ""

    def credentials(self) -> grpc.ServerCredentials:
        """For a port. New connections see what the files say then; files that cannot be read change nothing.

        Raises:
            ConfigError: a file cannot be read, or client certificates are asked for without saying whose.
        """
        seen = tuple(map(file_version, (self.cert_file, self.key_file, self.client_ca_file)))

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            now = tuple(map(file_version, (self.cert_file, self.key_file, self.client_ca_file)))
            if now == seen:
                return None
            try:
                renewed = self._configuration()
            except ConfigError as error:
                _log.error("certificate not renewed", error=str(error))
                return None
            seen = now
            _log.info("certificate renewed", file=self.cert_file)
            return renewed

        # The stubs do not know that None is "as before".
        return grpc.dynamic_ssl_server_credentials(self._configuration(), fetch, bool(self.client_ca_file))  # type: ignore[arg-type]

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (_read("tls_key_file", self.key_file), _read("tls_cert_file", self.cert_file))
        roots = _read("tls_client_ca_file", self.client_ca_file) if self.client_ca_file else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Whom a client trusts, and who it is.

    Attributes:
        ca_file: certificates that sign servers'.
        cert_file: its own certificate chain, for servers that ask; empty: none.
        key_file: the private key.
        server_name: the name that servers' certificates carry, where it is not the one connected to: endpoints are
            found by name and connected to by address.
    """

    ca_file: str
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""

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
            root_certificates=_read("peer_tls_ca_file", self.ca_file),
            private_key=_read("peer_tls_key_file", self.key_file) if self.key_file else None,
            certificate_chain=_read("peer_tls_cert_file", self.cert_file) if self.cert_file else None,
        )

    def versions(self) -> tuple[FileVersion | None, ...]:
        """Different once a file has changed."""
        return tuple(map(file_version, (self.ca_file, self.cert_file, self.key_file)))
