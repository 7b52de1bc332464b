"""Short names of prefixes, by which services tell routers what is in their memory.

A prefix is named at every multiple of :data:`STRIDE_TOKENS`: fingerprint ``n`` stands for its first
``(n + 1) x STRIDE_TOKENS`` tokens. They are not the names of stored blocks: nobody reads KV by them, and who lacks the
deployment's salt can neither make them nor ask with them whether a conversation is in memory. They only steer: a
service always looks into its own memory, so one that collides or is out of date costs time, never right tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

from alora_serve.kv.keys import digest_fields

STRIDE_TOKENS: Final = 256
"""Finer names would tell more than a fetch's noise: 256 tokens of a small model move in about 3 ms."""
MAX_FINGERPRINTS: Final = 1024
"""In one digest: 8 KiB, and 262,144 tokens of resident KV, more than most workers have memory for."""

_FINGERPRINT_BYTES: Final = 8
_TOKEN_BYTES: Final = 4


class PrefixFingerprints:
    """Names prefixes, the same in every process that has the deployment's salt."""

    def __init__(self, deployment_salt: bytes) -> None:
        self._salt = deployment_salt

    def of(self, tokens: Sequence[int], *, model_digest: bytes, tenant_salt: bytes = b"") -> tuple[int, ...]:
        """Fingerprints of ``tokens`` at each whole stride, shortest first; each of 64 bits.

        About 0.2 ms for 6,000 tokens.

        Args:
            tokens: ids below 2**32.
            model_digest: of the base model; another model's KV is not the same prefix.
            tenant_salt: whose prefix it is; another tenant's is not the same either.
        """
        strides = len(tokens) // STRIDE_TOKENS
        packed = struct.pack(f"<{strides * STRIDE_TOKENS}I", *tokens[: strides * STRIDE_TOKENS])
        tenant = (("tenant", tenant_salt),) if tenant_salt else ()
        key = digest_fields("alora-serve prefix fingerprint", ("model", model_digest), ("salt", self._salt), *tenant)
        hasher = hashlib.blake2b(key=key, digest_size=_FINGERPRINT_BYTES)
        step = STRIDE_TOKENS * _TOKEN_BYTES
        named = []
        for start in range(0, len(packed), step):
            hasher.update(packed[start : start + step])
            named.append(int.from_bytes(hasher.copy().digest(), "little"))
        return tuple(named)
