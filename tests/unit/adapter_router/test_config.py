"""The router's settings."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from adapter_router.admission import RouterLimits
from adapter_router.config import Settings
from adapter_router.endpoints.endpoint import EndpointOptions
from alora_serve.config import load_settings
from alora_serve.errors import ConfigError, OverloadedError, PermissionRefusedError, UnauthenticatedError
from alora_serve.kv.fingerprints import STRIDE_TOKENS, PrefixFingerprints
from alora_serve.rpc.tls import ClientTls
from alora_serve.types import ANYONE, Identity
from fake_services import SECRET, handle

FLAGS = (
    "--base-prefill-endpoints=dns:///prefill:1",
    "--decode-endpoints=h:1,[::1]:2",
)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALORA_HANDLE_SECRETS", SECRET.decode())


def test_settings_reach_the_parts_they_are_for() -> None:
    more = ("--bounded-load-factor=2", "--resolve-seconds=7", "--max-attempts=4", "--max-in-flight=5")
    shares = ("--tenant-share=0.5", "--default-deadline-seconds=6")
    settings = load_settings(Settings, [*FLAGS, *more, *shares])
    settings.check_endpoints()
    assert settings.decode_endpoints == ("h:1", "[::1]:2")
    assert settings.endpoint_options() == EndpointOptions(load_factor=2, resolve_seconds=7)
    assert settings.limits() == RouterLimits(
        max_attempts=4, max_in_flight=5, tenant_share=0.5, default_deadline_seconds=6
    )
    settings.signer().verify(handle())


def test_prefixes_are_named_under_the_tenants_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALORA_TENANT_SALT", "salt")
    conversation = handle(range(STRIDE_TOKENS))
    expected = PrefixFingerprints(b"salt").of(conversation.prefix_tokens, model_digest=conversation.model_digest)
    assert load_settings(Settings, FLAGS).demands().generation(conversation, None).fingerprints == expected


@pytest.mark.parametrize("missing", ["base_prefill_endpoints", "decode_endpoints"])
def test_a_router_without_endpoints_does_not_start(missing: str) -> None:
    flags = [flag for flag in FLAGS if missing.replace("_", "-") not in flag]
    with pytest.raises(ConfigError, match=f"{missing} is empty"):
        load_settings(Settings, flags).check_endpoints()


def test_a_router_without_a_secret_does_not_start_and_suggests_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALORA_HANDLE_SECRETS")
    with pytest.raises(ConfigError, match=r"handle_secrets is empty: set ALORA_HANDLE_SECRETS .* for example \S{32}$"):
        load_settings(Settings, FLAGS).signer()


def test_an_access_file_brings_tenants_and_their_quotas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "access.yaml"
    path.write_text("tenants: {acme: {max_sequences: 1}}")
    settings = load_settings(Settings, [*FLAGS, f"--access-file={path}"])
    with pytest.raises(ConfigError, match="tenant_salt is empty"):
        settings.access()
    monkeypatch.setenv("ALORA_TENANT_SALT", "salt")
    access, quotas = load_settings(Settings, [*FLAGS, f"--access-file={path}"]).access()
    with pytest.raises(UnauthenticatedError):
        access.authorize("/alora_serve.v1.AloraService/Generate", {})
    with pytest.raises(OverloadedError), quotas.hold("acme", sequences=2, prompt_tokens=0):
        pytest.fail("the quota was not held to")
    with pytest.raises(ConfigError, match="needs jwt_issuer and jwt_audience"):
        load_settings(Settings, [*FLAGS, f"--jwks-file={path}"]).access()


def test_a_jwks_file_brings_callers_with_tokens_of_its_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [{**public, "kid": "k", "alg": "ES256"}]}))
    monkeypatch.setenv("ALORA_TENANT_SALT", "salt")
    flags = [*FLAGS, f"--jwks-file={path}", "--jwt-issuer=https://issuer", "--jwt-audience=alora"]
    claims_flags = ["--jwt-tenant-claim=org", "--jwt-roles-claim=scopes"]
    access, _ = load_settings(Settings, [*flags, *claims_flags]).access()

    def calling(method: str, **claims: object) -> Identity:
        given = {"iss": "https://issuer", "aud": "alora", "exp": time.time() + 60, "org": "acme", **claims}
        token = jwt.encode(given, key, "ES256", headers={"kid": "k"})
        return access.authorize(f"/alora_serve.v1.AloraService/{method}", {"authorization": f"Bearer {token}"})

    rules = tmp_path / "access.yaml"
    rules.write_text("default: {max_sequences: 1}")
    _, quotas = load_settings(Settings, [*flags, f"--access-file={rules}"]).access()
    with pytest.raises(OverloadedError), quotas.hold("acme", sequences=2, prompt_tokens=0):
        pytest.fail("a tenant of a JWT was not held to the default")
    assert calling("Generate").tenant == "acme"
    assert calling("LoadAdapter", scopes=["admin"]).tenant == "acme"
    with pytest.raises(PermissionRefusedError):
        calling("LoadAdapter")
    for wrong in ({"iss": "https://other"}, {"aud": "other"}, {"org": "not a name"}):
        with pytest.raises(UnauthenticatedError):
            calling("Generate", **wrong)
    with pytest.raises(UnauthenticatedError):
        access.authorize("/alora_serve.v1.AloraService/Generate", {})


def test_without_such_files_everybody_is_let_in() -> None:
    access, _ = load_settings(Settings, FLAGS).access()
    assert access.authorize("/alora_serve.v1.AloraService/LoadAdapter", {}) == ANYONE


def test_services_are_spoken_to_over_tls_where_an_authority_is_named() -> None:
    assert ClientTls.of_peers(load_settings(Settings, FLAGS)) is None
    flags = [*FLAGS, "--peer-tls-ca-file=ca.pem", "--peer-tls-server-name=worker"]
    assert ClientTls.of_peers(load_settings(Settings, flags)) == ClientTls("ca.pem", server_name="worker")
