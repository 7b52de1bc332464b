"""Signs prefix handles and checks the ones that come back: nobody can hand in tokens the server never issued."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final

from alora_serve.errors import (
    ConfigError,
    FieldViolation,
    HandleExpiredError,
    HandleInvalidError,
    ModelMismatchError,
)
from alora_serve.types import PrefixHandle

CLOCK_SKEW_SECONDS: Final = 60
"""How far two servers' clocks may be apart before a fresh handle of one looks expired to the other."""

MIN_SECRET_BYTES: Final = 16
"""Shorter secrets can be guessed from one handle by trying them all."""

_DOMAIN: Final = b"alora-serve prefix handle 1"
"""Keeps these MACs apart from anything else signed with the same secret, and from later encodings."""


class HandleSigner:
    """Signs with the first secret and accepts any, so that secrets rotate while old handles live. Thread-safe."""

    def __init__(
        self,
        secrets: Sequence[bytes],
        deployment_salt: bytes,
        ttl_seconds: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep the keys.

        Args:
            secrets: shared by all replicas; the first signs, all verify. Each at least ``MIN_SECRET_BYTES`` long.
            deployment_salt: part of what is signed.
            ttl_seconds: how long a handle lives.
            clock: Unix time in seconds.

        Raises:
            ConfigError: no secret, or one that is too short.
        """
        if not secrets or min(map(len, secrets)) < MIN_SECRET_BYTES:
            raise ConfigError(f"handle_secrets: give at least one secret of {MIN_SECRET_BYTES} bytes or more")
        self._secrets = tuple(secrets)
        self._salt_digest = hashlib.sha256(deployment_salt).digest()
        self._ttl_seconds = ttl_seconds
        self._clock = clock

    def sign(self, handle: PrefixHandle, *, tenant_salt: bytes = b"") -> PrefixHandle:
        """The handle with its expiry set from now and a fresh MAC; both fields of the argument are ignored.

        It is of no use to another tenant than the one whose salt is given.
        """
        expiring = dataclasses.replace(handle, expires_unix_seconds=int(self._clock()) + self._ttl_seconds)
        return dataclasses.replace(expiring, mac=self._mac(self._secrets[0], expiring, tenant_salt))

    def verify(
        self,
        handle: PrefixHandle,
        *,
        tenant_salt: bytes = b"",
        field: str = "prompt.handle",
        may_have_expired: bool = False,
    ) -> None:
        """Return if this deployment issued the handle to this tenant and it lives; ``field`` names it in violations.

        It need not live any more where it ``may_have_expired`` since it was verified.

        Raises:
            HandleInvalidError: the MAC verifies under no secret.
            HandleExpiredError: it is past its expiry and the allowed clock skew.
        """
        macs = [self._mac(secret, handle, tenant_salt) for secret in self._secrets]
        if not any(hmac.compare_digest(mac, handle.mac) for mac in macs):
            problem = "not issued by this deployment, or changed since; send the conversation again"
            raise HandleInvalidError(f"{field}: {problem}", violations=[FieldViolation(field, problem)])
        age_seconds = self._clock() - handle.expires_unix_seconds
        if age_seconds > CLOCK_SKEW_SECONDS and not may_have_expired:
            problem = f"expired {age_seconds:.0f} s ago; send the conversation again"
            raise HandleExpiredError(f"{field}: {problem}", violations=[FieldViolation(field, problem)])

    def _mac(self, secret: bytes, handle: PrefixHandle, tenant_salt: bytes) -> bytes:
        return hmac.digest(secret, _encode(handle, self._salt_digest, tenant_salt), "sha256")


def check_model(handle: PrefixHandle, model_digest: bytes) -> None:
    """Return if the handle was made for this model.

    Raises:
        ModelMismatchError: other weights, forward config, tokenizer or chat template.
    """
    if handle.model_digest != model_digest:
        raise ModelMismatchError(
            f"the handle is of model {handle.model_digest.hex()[:12]}, this server has {model_digest.hex()[:12]}; "
            "send the conversation again"
        )


def check_begun(begun_with: bytes, model_digest: bytes) -> None:
    """Return if an interrupted stream began with this model: no answer is of two.

    Raises:
        ModelMismatchError: it began with another one.
    """
    if begun_with != model_digest:
        raise ModelMismatchError(
            f"the interrupted stream is of model {begun_with.hex()[:12]}, this would go on with "
            f"{model_digest.hex()[:12]}; start anew"
        )


def _encode(handle: PrefixHandle, salt_digest: bytes, tenant_salt: bytes) -> bytes:
    """Every field but the MAC, by name, type and length: no two different handles encode alike.

    Walking the dataclass makes a field added later part of the MAC without anyone remembering to.
    """
    # No field's name is as long as a salt, so a handle without a tenant never encodes like one of a tenant.
    parts = [_DOMAIN, salt_digest, *([tenant_salt] if tenant_salt else [])]
    for field in dataclasses.fields(handle):
        if field.name != "mac":
            parts += [field.name.encode(), *_typed(getattr(handle, field.name))]
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def _typed(value: object) -> tuple[bytes, bytes]:
    """A tag naming the type, and the value's bytes."""
    match value:
        case bool():
            return b"bool", bytes([value])
        case int():
            return b"int64", struct.pack("<q", value)
        case bytes():
            return b"bytes", value
        case str():
            return b"str", value.encode()
        case tuple():
            return b"uint32s", struct.pack(f"<{len(value)}I", *value)
        case enum.Enum():
            return b"enum", str(value.value).encode()
    raise TypeError(f"no encoding for {type(value).__name__}")
