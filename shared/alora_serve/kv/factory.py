"""Makes the store that a URL names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from alora_serve.kv.guarded import GuardedStore, InstrumentedStore, StoreMetrics
from alora_serve.kv.lmdb import LmdbStore, default_location
from alora_serve.kv.redis_url import REDIS_SCHEMES, TlsFiles
from alora_serve.kv.sealed import SEALING_BYTES, Protection, SealedStore
from alora_serve.kv.store import KVStore
from alora_serve.kv.store_url import url_error

MAX_RECORD_BYTES: Final = 64 << 20
"""Of any layout that is served."""


def open_store(
    url: str,
    *,
    budget_bytes: int,
    ttl_seconds: float,
    breaker_failures: int,
    breaker_reset_seconds: float,
    metrics: StoreMetrics,
    tls: TlsFiles | None = None,
    protection: Protection = "none",
    secrets: Sequence[bytes] = (),
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> KVStore:
    """The store at ``url``, behind circuit breakers and measured. Nothing is connected or opened before the first call.

    Args:
        url: ``lmdb:`` (default place), ``lmdb:///directory``, or as :func:`~alora_serve.kv.redis_url.parse_redis_url`.
        budget_bytes: LMDB: what the values may occupy; Redis has ``maxmemory`` for that.
        ttl_seconds: Redis: a value not written for so long expires.
        breaker_failures: failures in a row that open a breaker.
        breaker_reset_seconds: time until an open breaker lets a probe through.
        metrics: told about every call and every change of a breaker.
        tls: for ``rediss``.
        protection: what is done to values, see :class:`~alora_serve.kv.sealed.SealedStore`.
        secrets: for that.
        max_record_bytes: of the longest value that is put into the store: Redis reads none that is longer.

    Raises:
        ConfigError: the URL cannot be served, or speaks no TLS where ``tls`` names files (names it, without user and
            password), or a secret is missing.
    """
    most = max_record_bytes + SEALING_BYTES
    backend = _backend(url, budget_bytes=budget_bytes, ttl_seconds=ttl_seconds, tls=tls, max_value_bytes=most)
    if protection != "none":
        backend = SealedStore(backend, protection, secrets)
    guarded = GuardedStore(
        backend, failures_to_open=breaker_failures, reset_seconds=breaker_reset_seconds, metrics=metrics
    )
    return InstrumentedStore(guarded, metrics)


def _backend(url: str, *, budget_bytes: int, ttl_seconds: float, tls: TlsFiles | None, max_value_bytes: int) -> KVStore:
    scheme = url.partition(":")[0]
    if tls is not None and tls.has_files and not scheme.startswith("rediss"):
        raise url_error(url, "store_tls_* are set, and only rediss, rediss+cluster and rediss+sentinel speak TLS")
    if scheme == "lmdb":
        return LmdbStore(lmdb_root(url), budget_bytes=budget_bytes)
    if scheme in REDIS_SCHEMES:
        # Here: redis-py takes half a second to load, and brings OpenTelemetry's SDK with it where that is installed.
        from alora_serve.kv.redis import RedisStore

        return RedisStore(url, ttl_seconds=ttl_seconds, tls=tls, max_value_bytes=max_value_bytes)
    raise url_error(url, f"the scheme must be one of {', '.join(sorted({'lmdb', *REDIS_SCHEMES}))}")


def lmdb_root(url: str) -> Path:
    """The directory of an LMDB URL. Raises ConfigError when it names none."""
    parts = urlsplit(url)
    if parts.netloc or parts.query or parts.fragment:
        raise url_error(url, "write lmdb: or lmdb:///absolute/directory")
    if not parts.path:
        return default_location()
    root = Path(unquote(parts.path))
    if not root.is_absolute():
        raise url_error(url, "the directory must be absolute, as in lmdb:///var/cache/kv")
    return root
