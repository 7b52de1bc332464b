"""A wrapper that lets nobody without a secret of the deployment put a value into the store that is used, or read one.

::

    magic 4s | scheme 1s | key id 4s | nonce 12s | body | tag

``mac``: the body is the value, the tag HMAC-SHA256 over all before it. ``encrypt``: body and tag are AES-256-GCM's.
Both bind the key the value is stored under: a valid value copied to another key is no longer one. What does not open is
handed out empty, which is no record: a miss, counted as corrupt, and deleted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from alora_serve.errors import ConfigError
from alora_serve.kv.store import KVStore, Put, Sink, StoreKey

Protection = Literal["none", "mac", "encrypt"]
"""What is done to stored values. Part of the key root: services that differ share no blocks."""

MIN_SECRET_BYTES: Final = 16

_MAGIC: Final = b"aLSV"
_SCHEMES: Final = {"mac": b"m", "encrypt": b"e"}
_KEY_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = {"mac": 32, "encrypt": 16}
_HEADER_BYTES: Final = len(_MAGIC) + 1 + _KEY_ID_BYTES + _NONCE_BYTES
SEALING_BYTES: Final = _HEADER_BYTES + max(_TAG_BYTES.values())
"""What sealing adds to a value, at most."""
_NOTHING: Final = memoryview(b"")


class _Key:
    """One secret's key for one scheme."""

    def __init__(self, secret: bytes, protection: Literal["mac", "encrypt"]) -> None:
        derive = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"alora-serve store " + protection.encode())
        self._protection = protection
        self._key = derive.derive(secret)
        self._cipher = AESGCM(self._key)
        self.id = hashlib.sha256(b"id" + self._key).digest()[:_KEY_ID_BYTES]

    def seal(self, store_key: StoreKey, value: memoryview) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        header = b"".join((_MAGIC, _SCHEMES[self._protection], self.id, nonce))
        if self._protection == "encrypt":
            return header + self._cipher.encrypt(nonce, value, header + store_key)
        return b"".join((header, value, self._mac(store_key, header, value)))

    def open(self, store_key: StoreKey, sealed: memoryview) -> memoryview | None:
        header, rest = bytes(sealed[:_HEADER_BYTES]), sealed[_HEADER_BYTES:]
        if self._protection == "encrypt":
            try:
                return memoryview(self._cipher.decrypt(header[-_NONCE_BYTES:], rest, header + store_key))
            except InvalidTag:
                return None
        # A copy: what lies in shared memory could be another once it has been found good.
        value, tag = memoryview(bytes(rest[: -_TAG_BYTES["mac"]])), rest[-_TAG_BYTES["mac"] :]
        return value if hmac.compare_digest(self._mac(store_key, header, value), tag) else None

    def _mac(self, store_key: StoreKey, header: bytes, value: memoryview) -> bytes:
        mac = hmac.new(self._key, header + store_key, "sha256")
        mac.update(value)
        return mac.digest()


class SealedStore:
    """A :class:`~alora_serve.kv.store.KVStore` whose values are sealed on their way in and opened on their way out.

    Args:
        inner: the store; closed with this one.
        protection: ``mac`` or ``encrypt``.
        secrets: the first seals, all open: a new one goes first, and the old one is dropped once its values expired.

    Raises:
        ConfigError: no secret, or one that is too short.
    """

    def __init__(self, inner: KVStore, protection: Literal["mac", "encrypt"], secrets: Sequence[bytes]) -> None:
        if not secrets or min(map(len, secrets)) < MIN_SECRET_BYTES:
            raise ConfigError(
                f"store_secrets: {protection} needs at least one secret of {MIN_SECRET_BYTES} bytes or more"
            )
        self._inner = inner
        self._smallest = _HEADER_BYTES + _TAG_BYTES[protection]
        self._beginning = _MAGIC + _SCHEMES[protection]
        self._keys = [_Key(secret, protection) for secret in secrets]
        self._by_id = {key.id: key for key in self._keys}

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`. A value that does not open is handed out empty."""

        def opened(index: int, value: memoryview) -> None:
            sink(index, self._open(keys[index], value))

        self._inner.get_many(keys, opened, timeout_seconds=timeout_seconds)

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        return self._inner.contains_many(keys, timeout_seconds=timeout_seconds)

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        first = self._keys[0]
        sealed = [replace(put, value=first.seal(put.key, memoryview(put.value).cast("B"))) for put in puts]
        self._inner.put_many(sealed, timeout_seconds=timeout_seconds)

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        self._inner.delete_many(keys, timeout_seconds=timeout_seconds)

    def close(self) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        self._inner.close()

    def _open(self, store_key: StoreKey, sealed: memoryview) -> memoryview:
        beginning = len(self._beginning)
        if len(sealed) < self._smallest or bytes(sealed[:beginning]) != self._beginning:
            return _NOTHING
        key = self._by_id.get(bytes(sealed[beginning : beginning + _KEY_ID_BYTES]))
        opened = key.open(store_key, sealed) if key is not None else None
        return _NOTHING if opened is None else opened
