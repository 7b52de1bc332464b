"""Certificate files: read by the setting that names them, and how long they last told to Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificates

from alora_serve.config import FrontDoorSettings, RouterSettings, ServerSettings, StoreSettings
from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import ConfigError
from alora_serve.metrics import CertificateMetrics


def read_pem(setting: str, file: str) -> bytes:
    """The content of a file.

    Raises:
        ConfigError: it cannot be read; names the setting.
    """
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} {file}: {error.strerror}") from error


def expiry_seconds(setting: str, file: str) -> float:
    """When the first certificate of a chain expires, in seconds since the epoch: the chain is good until then.

    Raises:
        ConfigError: no certificate is in it, or it cannot be read; names the setting.
    """
    try:
        chain = load_pem_x509_certificates(read_pem(setting, file))
    except ValueError as error:
        raise ConfigError(f"{setting} {file}: no PEM certificate: {error}") from error
    return min(certificate.not_valid_after_utc.timestamp() for certificate in chain)


def watch_client_certificates(settings: ServerSettings, metrics: CertificateMetrics) -> None:
    """Tell when the certificates expire that the service shows to its peers and to its store, if it does.

    Raises:
        ConfigError: one cannot be read.
    """
    if isinstance(settings, RouterSettings) and settings.peer_tls_cert_file:
        metrics.watch("peer", _expiry("peer_tls_cert_file", settings.peer_tls_cert_file))
    if isinstance(settings, FrontDoorSettings) and settings.router_tls_cert_file:
        metrics.watch("peer", _expiry("router_tls_cert_file", settings.router_tls_cert_file))
    if isinstance(settings, StoreSettings) and settings.store_tls_cert_file:
        metrics.watch("store", _expiry("store_tls_cert_file", settings.store_tls_cert_file))


def _expiry(setting: str, file: str) -> Callable[[], float]:
    # Connections read the file when they are made, so what it says now is what the next one shows.
    expiry = Reloaded([file], lambda: expiry_seconds(setting, file))
    return lambda: expiry.content
