"""From what a caller shows to who it is: API keys, or JWTs signed by a known issuer."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import jwt
from pydantic import TypeAdapter, ValidationError

from adapter_router.access.rules import AccessRules, TenantName
from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import ConfigError, PermissionRefusedError, UnauthenticatedError
from alora_serve.types import ANYONE, Identity, Role

AUTHORIZATION_KEY: Final = "authorization"

ADMIN_METHODS: Final = frozenset({"LoadAdapter", "UnloadAdapter", "PurgeTenant"})
"""Methods that change the service for others."""

_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""All of public keys: with a shared secret, whoever verifies could sign."""
_CLOCK_SKEW_SECONDS: Final = 60
_tenant_name: TypeAdapter[str] = TypeAdapter(TenantName)


class Authenticator(Protocol):
    """Tells callers apart."""

    def identify(self, token: str) -> Identity | None:
        """Whose token this is; None where it is nobody's that this knows of."""


class ApiKeys:
    """Keys of the access file."""

    def __init__(self, rules: Reloaded[AccessRules]) -> None:
        self._rules = rules

    def identify(self, token: str) -> Identity | None:
        """See :class:`Authenticator`. Takes as long for every key, known or not."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        moment = datetime.now(UTC)
        found = None
        for key in self._rules.content.keys:
            if hmac.compare_digest(key.sha256, digest) and key.is_valid_at(moment):
                found = Identity(key.tenant, key.roles)
        return found


@dataclass(frozen=True, slots=True)
class JwtRules:
    """What a JWT must say.

    Attributes:
        issuer: its ``iss``.
        audience: one of its ``aud``.
        tenant_claim: the claim that names the tenant.
        roles_claim: the claim that lists roles, or names one; without it a token is for generating.
    """

    issuer: str
    audience: str
    tenant_claim: str
    roles_claim: str


class Jwts:
    """Tokens signed by keys of a JWKS file."""

    def __init__(self, keys: Reloaded[jwt.PyJWKSet], rules: JwtRules) -> None:
        self._keys = keys
        self._rules = rules

    def identify(self, token: str) -> Identity | None:
        """See :class:`Authenticator`."""
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            keys = [key for key in self._keys.content.keys if key_id is None or key.key_id == key_id]
            for key in keys:
                claims = self._claims(token, key)
                if claims is not None:
                    return self._identity(claims)
        except jwt.PyJWTError:
            return None
        return None

    def _claims(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any] | None:
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(_ALGORITHMS),
                issuer=self._rules.issuer,
                audience=self._rules.audience,
                leeway=_CLOCK_SKEW_SECONDS,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError:  # of another key, or not valid at all
            return None
        return claims

    def _identity(self, claims: Mapping[str, Any]) -> Identity | None:
        try:
            tenant = _tenant_name.validate_python(claims.get(self._rules.tenant_claim), strict=True)
        except ValidationError:
            return None
        listed = claims.get(self._rules.roles_claim, ["generate"])
        # A list, and not a set: an issuer may list what cannot be hashed, which is no role that is known here.
        named = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
        known: tuple[Role, ...] = ("generate", "admin")
        return Identity(tenant, frozenset(role for role in known if role in named))


def read_jwks(path: Path) -> jwt.PyJWKSet:
    """Read a JWKS file.

    Raises:
        ConfigError: it is none.
    """
    try:
        return jwt.PyJWKSet.from_json(path.read_text())
    except (OSError, ValueError, RecursionError, jwt.PyJWTError, AttributeError, LookupError, TypeError) as error:
        raise ConfigError(f"jwks_file {path}: {type(error).__name__}: {error}") from error


class Access:
    """Decides whether a call may be made, and for whom.

    Args:
        authenticators: asked in turn; none: everybody may do everything, without a tenant.
        admin_methods: whether methods that change the service for others are served at all.
    """

    def __init__(self, *authenticators: Authenticator, admin_methods: bool = True) -> None:
        self._authenticators = authenticators
        self._admin_methods = admin_methods

    def authorize(self, method: str, metadata: Mapping[str, str | bytes]) -> Identity:
        """Who makes this call of ``/package.Service/Method``.

        Raises:
            UnauthenticatedError: nobody that is known.
            PermissionRefusedError: somebody who may not.
        """
        identity = self._identify(metadata)
        name = method.rpartition("/")[2]
        if name in ADMIN_METHODS and not self._admin_methods:
            raise PermissionRefusedError(f"{name} is turned off here (admin_methods)")
        role: Role = "admin" if name in ADMIN_METHODS else "generate"
        if role not in identity.roles:
            raise PermissionRefusedError(f"{name} needs a key with the role {role!r}")
        return identity

    def _identify(self, metadata: Mapping[str, str | bytes]) -> Identity:
        if not self._authenticators:
            return ANYONE
        given = metadata.get(AUTHORIZATION_KEY)
        scheme, _, token = given.partition(" ") if isinstance(given, str) else ("", "", "")
        if scheme.lower() == "bearer" and token:
            for authenticator in self._authenticators:
                if (identity := authenticator.identify(token.strip())) is not None:
                    return identity
        raise UnauthenticatedError("send a valid key as metadata: authorization: Bearer <key>")
