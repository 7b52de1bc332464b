"""Who may call what: keys by their digests, tokens by their issuer's signature, and nobody else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from adapter_router.access.authentication import Access, ApiKeys, JwtRules, Jwts, read_jwks
from adapter_router.access.rules import AccessRules, Quota, read_rules
from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import ConfigError, PermissionRefusedError, UnauthenticatedError
from alora_serve.types import ANYONE, Identity

GENERATE = "/alora_serve.v1.AloraService/Generate"
LOAD = "/alora_serve.v1.AloraService/LoadAdapter"
RULES = JwtRules("https://issuer", "alora", "tenant", "roles")


def bearer(token: str) -> dict[str, str | bytes]:
    return {"authorization": f"Bearer {token}"}


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write_rules(path: Path, *keys: dict[str, Any], tenants: Any = None) -> Path:
    named = {key["tenant"]: None for key in keys} if tenants is None else tenants
    path.write_text(yaml.safe_dump({"tenants": named, "keys": list(keys)}))
    return path


def keys_of(path: Path) -> ApiKeys:
    return ApiKeys(Reloaded([path], partial(read_rules, path)))


# --- API keys ---------------------------------------------------------------------------------------------------------


def test_a_key_is_its_tenants_and_good_for_its_roles(tmp_path: Path) -> None:
    path = write_rules(
        tmp_path / "access.yaml",
        {"tenant": "acme", "sha256": digest("one")},
        {"tenant": "acme", "sha256": digest("two"), "roles": ["generate", "admin"]},
        {"tenant": "other", "sha256": digest("three"), "roles": ["admin"]},
    )
    access = Access(keys_of(path))
    assert access.authorize(GENERATE, bearer("one")) == Identity("acme", frozenset({"generate"}))
    assert access.authorize(LOAD, bearer("two")).tenant == "acme"
    with pytest.raises(PermissionRefusedError, match="'admin'"):
        access.authorize(LOAD, bearer("one"))
    with pytest.raises(PermissionRefusedError, match="'generate'"):
        access.authorize(GENERATE, bearer("three"))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer nobody's"},
        {"authorization": "Basic one"},
        {"authorization": b"Bearer one"},
        {"authorization": "Bearer " + digest("one")},
        {"x-api-key": "one"},
    ],
)
def test_whoever_shows_no_valid_key_is_nobody(tmp_path: Path, metadata: dict[str, str | bytes]) -> None:
    path = write_rules(tmp_path / "access.yaml", {"tenant": "acme", "sha256": digest("one")})
    with pytest.raises(UnauthenticatedError):
        Access(keys_of(path)).authorize(GENERATE, metadata)


def test_a_key_expires(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    path = write_rules(
        tmp_path / "access.yaml",
        {"tenant": "acme", "sha256": digest("old"), "expires": now - timedelta(seconds=1)},
        {"tenant": "acme", "sha256": digest("new"), "expires": now + timedelta(hours=1)},
    )
    keys = keys_of(path)
    assert keys.identify("old") is None
    assert keys.identify("new") is not None


def test_keys_are_rotated_without_a_restart_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    path = write_rules(tmp_path / "access.yaml", {"tenant": "acme", "sha256": digest("one")})
    keys = keys_of(path)
    assert keys.identify("one")
    replacement = write_rules(tmp_path / "next.yaml", {"tenant": "acme", "sha256": digest("two")})
    replacement.replace(path)
    assert keys.identify("one") is None
    assert keys.identify("two")
    path.write_text("keys: [")
    assert keys.identify("two")
    path.unlink()
    assert keys.identify("two")


MISTYPED = "tenants: {acme: ~}\nkeys:\n- {tenant: acme, sha256: " + "0" * 64 + ", expires: 2027-02-30T00:00:00Z}\n"


def test_a_mistyped_date_leaves_the_keys_before_in_force_and_is_told_by_its_line(tmp_path: Path) -> None:
    path = write_rules(tmp_path / "access.yaml", {"tenant": "acme", "sha256": digest("one")})
    keys = keys_of(path)
    with capture_logs() as logs:
        path.write_text(MISTYPED)
        assert [keys.identify("one") is not None for _ in range(3)] == [True] * 3
    [line] = logs
    assert line["error"].endswith("access.yaml: MarkedYAMLError in line 3")
    assert "0000" not in line["error"]


@pytest.mark.parametrize(
    "content", ["[" * 5_000, "a: !!bool maybe", "a: [", "tenants: {acme: {stored_bytes_per_day: .inf}}"]
)
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "access.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"access\.yaml: "):
        read_rules(path)


def test_without_access_control_everybody_is_anyone() -> None:
    assert Access().authorize(LOAD, {}) == ANYONE
    with pytest.raises(PermissionRefusedError, match="turned off"):
        Access(admin_methods=False).authorize(LOAD, {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"keys": [{"tenant": "acme", "sha256": digest("one")}]}, "tenants without an entry: acme"),
        ({"default": {"max_sequence": 1}}, "default.max_sequence: Extra"),
        ({"default": 5, "tenants": {"acme": None}}, "default: Input should be"),
        ({"tenants": {"acme": 5}}, "tenants.acme: Input should be"),
        ({"tenants": {"acme": {"max_sequences": 0}}}, "tenants.acme.max_sequences"),
        ({"tenants": {"../etc": {}}}, "tenants"),
        ({"tenants": {"acme": {}}, "keys": [{"tenant": "acme", "sha256": "the key itself"}]}, "keys.0.sha256"),
        ({"tenants": {"acme": {}}, "keys": [{"tenant": "acme", "sha256": digest("a"), "roles": ["root"]}]}, "roles"),
        ({"quotas": {}}, "quotas"),
    ],
)
def test_a_file_that_says_something_else_is_refused_without_its_secrets(
    tmp_path: Path, content: dict[str, Any], says: str
) -> None:
    path = tmp_path / "access.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        read_rules(path)
    assert says in str(caught.value)
    assert "the key itself" not in str(caught.value)


def test_the_file_that_the_page_shows_is_one(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs" / "configuration.md").read_text()
    path = tmp_path / "access.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    rules = read_rules(path)
    assert rules.quota_of("acme") == Quota(max_sequences=32, tokens_per_minute=100_000, stored_bytes_per_day=20 * 10**9)
    assert rules.quota_of("gamma") == Quota(tokens_per_minute=100_000, max_queued_tokens=200_000)
    assert rules.quota_of("beta") == rules.quota_of("a JWT's") == rules.default
    assert keys_of(path).identify("hello") == Identity("acme", frozenset({"generate"}))


def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "access.yaml"
    path.write_text("")
    assert read_rules(path) == AccessRules()


# --- JWTs -------------------------------------------------------------------------------------------------------------

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
STRANGER = ec.generate_private_key(ec.SECP256R1())


def write_jwks(path: Path) -> Path:
    rsa_key = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key()))
    ec_key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(EC.public_key()))
    path.write_text(
        json.dumps({"keys": [{**rsa_key, "kid": "r", "alg": "RS256"}, {**ec_key, "kid": "e", "alg": "ES256"}]})
    )
    return path


@pytest.fixture
def jwts(tmp_path: Path) -> Jwts:
    path = write_jwks(tmp_path / "jwks.json")
    return Jwts(Reloaded([path], partial(read_jwks, path)), RULES)


def token(key: Any = EC, algorithm: str = "ES256", kid: str | None = "e", **changes: Any) -> str:
    claims = {"iss": "https://issuer", "aud": "alora", "exp": time.time() + 600, "tenant": "acme", **changes}
    given = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(given, key, algorithm, headers={"kid": kid} if kid else None)


def signed_with_secret(secret: bytes) -> str:
    """By hand: the library refuses to sign with a public key."""
    _, claims, _ = token(RSA, "RS256", "r").split(".")
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"r","typ":"JWT"}').rstrip(b"=").decode()
    tag = hmac.digest(secret, f"{header}.{claims}".encode(), "sha256")
    return f"{header}.{claims}.{base64.urlsafe_b64encode(tag).rstrip(b'=').decode()}"


def test_a_token_of_the_issuer_is_taken(jwts: Jwts) -> None:
    assert jwts.identify(token()) == Identity("acme", frozenset({"generate"}))
    assert jwts.identify(token(RSA, "RS256", "r", roles=["admin", "else"])) == Identity("acme", frozenset({"admin"}))
    assert jwts.identify(token(kid=None, roles="generate")) == Identity("acme", frozenset({"generate"}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["generate", "admin"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(roles=JSON)
def test_whatever_it_says_about_roles_only_roles_count(jwts: Jwts, roles: Any) -> None:
    named = [roles] if isinstance(roles, str) else roles if isinstance(roles, list) else []
    claims = {"roles": roles} if roles is not None else {}
    expected = {role for role in ("generate", "admin") if role in named} if claims else {"generate"}
    assert jwts.identify(token(**claims)) == Identity("acme", frozenset(expected))


def test_what_it_lists_besides_roles_is_passed_over(jwts: Jwts) -> None:
    roles = [{"name": "admin"}, ["admin"], 7, None, "generate"]
    assert jwts.identify(token(roles=roles)) == Identity("acme", frozenset({"generate"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": 1.0},
        {"exp": None},
        {"iss": "https://another"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"tenant": None},
        {"tenant": ""},
        {"tenant": 7},
        {"tenant": "a/b"},
        {"nbf": time.time() + 3600},
    ],
)
def test_a_token_that_says_something_else_is_not(jwts: Jwts, changes: dict[str, Any]) -> None:
    assert jwts.identify(token(**changes)) is None


def test_a_token_that_somebody_else_signed_is_not(jwts: Jwts, tmp_path: Path) -> None:
    assert jwts.identify(token(STRANGER)) is None
    assert jwts.identify(token(STRANGER, kid=None)) is None
    assert jwts.identify(token(kid="unknown")) is None
    assert jwts.identify("no.token.at all") is None
    # The public key taken for a shared secret, and no signature at all: the classics.
    public = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert jwts.identify(signed_with_secret(public)) is None
    assert jwts.identify(token(None, "none", "r")) is None


def test_a_file_that_is_no_key_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    for content in ("", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "RSA"}]}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="jwks_file"):
            read_jwks(path)
    with pytest.raises(ConfigError, match="jwks_file"):
        read_jwks(tmp_path / "absent")


def test_either_kind_of_credential_is_taken(tmp_path: Path, jwts: Jwts) -> None:
    path = write_rules(tmp_path / "access.yaml", {"tenant": "beta", "sha256": digest("one")})
    access = Access(keys_of(path), jwts)
    assert access.authorize(GENERATE, bearer("one")).tenant == "beta"
    assert access.authorize(GENERATE, bearer(token())).tenant == "acme"
