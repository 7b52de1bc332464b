"""Which URL gives which store, and that refusals say why without saying the password."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alora_serve.errors import ConfigError
from alora_serve.kv.factory import open_store
from alora_serve.kv.guarded import InstrumentedStore
from alora_serve.kv.lmdb import LmdbStore, default_location
from alora_serve.kv.redis import RedisStore
from alora_serve.kv.redis_url import TlsFiles
from alora_serve.kv.sealed import Protection
from alora_serve.kv.store import Put
from store_peer import PATIENCE_SECONDS, RecordingMetrics, key_of, pattern, read


def made(url: str, **protection: Any) -> InstrumentedStore:
    store = open_store(
        url,
        budget_bytes=1 << 20,
        ttl_seconds=60,
        breaker_failures=3,
        breaker_reset_seconds=1,
        metrics=RecordingMetrics(),
        **protection,
    )
    assert isinstance(store, InstrumentedStore)
    return store


@pytest.mark.parametrize(
    ("url", "backend"),
    [
        ("lmdb:", LmdbStore),
        ("lmdb:///var/cache/alora", LmdbStore),
        ("redis://127.0.0.1:6379/0", RedisStore),
        ("redis://user:p%40ss@[::1]:6379", RedisStore),
        ("rediss://user:secret@host:6379/0", RedisStore),
        ("redis+cluster://host,other:7000", RedisStore),
        ("rediss+sentinel://host,[::1]:26380/primary/2?sentinel_password=x", RedisStore),
        ("unix:///run/valkey.sock?db=3", RedisStore),
    ],
)
def test_the_scheme_chooses_the_backend(url: str, backend: type) -> None:
    store = made(url)
    assert isinstance(store._inner._inner, backend)  # type: ignore[attr-defined]
    store.close()


@pytest.mark.parametrize(
    ("url", "root"),
    [("lmdb:", default_location()), ("lmdb:///a/b%20c", Path("/a/b c")), ("lmdb:/a/b", Path("/a/b"))],
)
def test_an_lmdb_url_names_a_directory(url: str, root: Path) -> None:
    assert made(url)._inner._inner._slot._root == root  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memcached://host", "memcached://host: the scheme must be one of lmdb, redis, redis+cluster"),
        ("nonsense", "nonsense: the scheme must be one of"),
        ("redis://user:secret@host,other", "redis://host,other: several addresses"),
        ("redis+cluster://user:secret@host/1", "redis+cluster://host/1: a cluster has no databases"),
        ("redis+sentinel://user:secret@host", "redis+sentinel://host: needs the master's name"),
        ("redis+sentinel://host/primary/x", "the database must be a number"),
        ("rediss://host:99999", "rediss://host:99999: malformed"),
        ("redis://user:secret@host/abc", "redis://host/abc: the database must be a number"),
        ("redis://user:secret@host:port", "redis://host:port: malformed"),
        ("redis://user:sec/ret@host:1", "redis://host:1: malformed"),
        ("redis:user:secret@host:1", "redis:host:1: malformed"),
        ("redis://user:secret@host?ssl=secret", "redis://host: has unknown options"),
        ("redis://user:sec?ret@host", "redis://: malformed"),
        ("redis+sentinel://host/main?sentinel_password=a#secret", "redis+sentinel://host/main: has unknown options"),
        ("redis+sentinel://host/main?sentinel_password=x&secret=y", "redis+sentinel://host/main: has unknown options"),
        ("unix://", "needs the absolute path"),
        ("unix:///socket?db=secret", "unix:///socket: the database must be a number"),
        ("lmdb:relative", "lmdb:relative: the directory must be absolute"),
        ("lmdb://host/path", "lmdb:///absolute/directory"),
        ("lmdb:///path?budget=1", "lmdb:///absolute/directory"),
    ],
)
def test_other_urls_are_refused_with_the_reason_and_without_the_password(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(url)
    assert says in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:
        assert "sec" not in str(error)
        error = error.__cause__


@pytest.mark.parametrize("file", ["ca_file", "cert_file", "key_file"])
@pytest.mark.parametrize(
    "url", ["redis://user:secret@host", "redis+cluster://host", "redis+sentinel://host/primary", "unix:///s", "lmdb:"]
)
def test_files_for_tls_are_refused_where_none_would_be_spoken(url: str, file: str) -> None:
    """Else KV and passwords would cross the network in plain text, with nobody told."""
    with pytest.raises(ConfigError, match="only rediss, rediss\\+cluster and rediss\\+sentinel speak TLS") as caught:
        made(url, tls=TlsFiles(**{file: "/etc/tls/file.pem"}))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster", "rediss+sentinel"])
def test_files_for_tls_are_taken_where_it_is_spoken(scheme: str) -> None:
    made(f"{scheme}://host/{'primary' if 'sentinel' in scheme else ''}", tls=TlsFiles("/etc/tls/ca.pem")).close()


@pytest.mark.parametrize(("scheme", "beginning"), [("mac", b"aLSVm"), ("encrypt", b"aLSVe"), ("none", b"")])
def test_protection_is_between_whoever_asks_and_the_backend(
    scheme: Protection, beginning: bytes, tmp_path: Path
) -> None:
    key, value = key_of("a"), pattern(key_of("a"), 1000)
    store = made(f"lmdb://{tmp_path}", protection=scheme, secrets=[b"a secret of these tests"])
    store.put_many([Put(key, value)], timeout_seconds=PATIENCE_SECONDS)
    assert read(store, [key], PATIENCE_SECONDS) == {0: value}
    guarded: Any = store._inner
    plain = guarded._inner if scheme == "none" else guarded._inner._inner  # what lies in the backend
    assert isinstance(plain, LmdbStore)
    [lying] = read(plain, [key], PATIENCE_SECONDS).values()
    assert lying.startswith(beginning)
    assert (lying == value) is (scheme == "none")
    assert (value in lying) is (scheme != "encrypt")
    if scheme != "none":
        plain.put_many([Put(key, value)], timeout_seconds=PATIENCE_SECONDS)
        assert read(store, [key], PATIENCE_SECONDS) == {0: b""}, "nobody sealed it"
    store.close()


@pytest.mark.parametrize("secrets", [[], [b"short"], [b"a secret of these tests", b"short"]])
def test_protection_without_a_good_secret_is_refused(secrets: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store_secrets"):
        made(f"lmdb://{tmp_path}", protection="mac", secrets=secrets)
