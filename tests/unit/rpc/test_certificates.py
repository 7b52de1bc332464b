"""How long certificates last is read from the files in use, and told for each use that there is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509 import load_pem_x509_certificates
from prometheus_client import CollectorRegistry

from adapter_router.config import Settings
from alora_serve.config import ServerSettings, StoreSettings
from alora_serve.errors import ConfigError
from alora_serve.metrics import CertificateMetrics
from alora_serve.rpc.certificates import expiry_seconds, watch_client_certificates
from openai_front.config import Settings as FrontSettings
from redis_servers import Certificates, make_certificates

NAME = "alora_certificate_expiry_timestamp_seconds"


class ModelServiceSettings(ServerSettings, StoreSettings):
    """As a model service's, as far as certificates go."""


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path)


def not_after(file: Path) -> float:
    return load_pem_x509_certificates(file.read_bytes())[0].not_valid_after_utc.timestamp()


def test_a_file_says_when_it_expires(files: Certificates) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    expired = expiry_seconds("setting", str(files.expired_file))
    assert expired == pytest.approx(yesterday.timestamp(), abs=60)
    assert expiry_seconds("setting", str(files.server_file)) == not_after(files.server_file) > expired


@pytest.mark.parametrize("turned", [False, True])
def test_a_chain_lasts_as_long_as_its_first_certificate_to_expire(
    files: Certificates, tmp_path: Path, turned: bool
) -> None:
    chain = [files.server_file.read_bytes(), files.expired_file.read_bytes()]
    (tmp_path / "chain.pem").write_bytes(b"".join(reversed(chain) if turned else chain))
    assert expiry_seconds("setting", str(tmp_path / "chain.pem")) == not_after(files.expired_file)


def test_a_file_without_a_certificate_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for name in ("empty.pem", "absent.pem"):
        with pytest.raises(ConfigError, match=rf"tls_cert_file .*{name}"):
            expiry_seconds("tls_cert_file", str(tmp_path / name))


def test_what_a_router_shows_its_peers_is_watched(files: Certificates) -> None:
    registry = CollectorRegistry()
    settings = Settings(peer_tls_ca_file=str(files.ca_file), peer_tls_cert_file=str(files.client_file))
    watch_client_certificates(settings, CertificateMetrics(registry))
    assert registry.get_sample_value(NAME, {"use": "peer"}) == not_after(files.client_file)
    files.expired_file.replace(files.client_file)
    assert registry.get_sample_value(NAME, {"use": "peer"}) == not_after(files.client_file), "the next connection's"
    files.client_file.unlink()
    assert registry.get_sample_value(NAME, {"use": "peer"}), "the last that could be read"


def test_what_the_front_door_shows_its_router_is_watched(files: Certificates) -> None:
    registry = CollectorRegistry()
    settings = FrontSettings(router_tls_ca_file=str(files.ca_file), router_tls_cert_file=str(files.client_file))
    watch_client_certificates(settings, CertificateMetrics(registry))
    assert registry.get_sample_value(NAME, {"use": "peer"}) == not_after(files.client_file)


def test_what_a_model_service_shows_its_store_is_watched(files: Certificates) -> None:
    registry = CollectorRegistry()
    settings = ModelServiceSettings(store_tls_cert_file=str(files.client_file))
    watch_client_certificates(settings, CertificateMetrics(registry))
    assert registry.get_sample_value(NAME, {"use": "store"}) == not_after(files.client_file)


def test_who_shows_none_has_no_series() -> None:
    for settings in (Settings(), FrontSettings(), ModelServiceSettings()):
        registry = CollectorRegistry()
        watch_client_certificates(settings, CertificateMetrics(registry))
        assert [sample for family in registry.collect() for sample in family.samples] == []
