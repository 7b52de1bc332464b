"""Parsers of what lies in the store, and of where it is."""

from __future__ import annotations

from functools import partial
from typing import Final, Literal

from alora_serve.errors import ConfigError
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.record import HEADER_BYTES, RecordRejected, RecordSpec, open_record, seal
from alora_serve.kv.redis_url import REDIS_SCHEMES, parse_redis_url
from alora_serve.kv.sealed import SealedStore
from alora_serve.kv.store import Put, StoreKey
from fuzz_targets.target import Target, must
from in_process import MemoryStore

_SECRET: Final = b"a secret of the fuzz targets"
_PLAIN: Final = bytes(range(48))
_PASSWORD: Final = "hunter2-of-the-fuzz-targets"
_SCHEMES: Final[tuple[Literal["mac", "encrypt"], ...]] = ("mac", "encrypt")
_SPEC: Final = RecordSpec(StoreKey(bytes(range(32))), KVLayout(2, 1, 4, "float32"), range(2), 3)


def _sealed_record() -> bytes:
    record = bytearray(HEADER_BYTES) + bytes(range(_SPEC.payload_bytes))
    seal(_SPEC, record)
    return bytes(record)


def record(data: bytes) -> None:
    """A value of the store; no payload of another size than its key says."""
    try:
        payload = open_record(_SPEC, data)
    except RecordRejected as error:
        must(error.reason in ("corrupt", "version"), error.reason)
    else:
        must(len(payload) == _SPEC.payload_bytes, "another size")


def sealed_value(data: bytes) -> None:
    """A protected value of the store; nothing comes out but what was sealed here, and only as it was sealed."""
    for scheme in _SCHEMES:
        found = _opened(scheme, data)
        must(found in (b"", _PLAIN), "forged")
        if found:
            for at in {0, sum(data) % len(data), len(data) - 1}:
                must(not _opened(scheme, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]), "changed, and opened")


def _opened(scheme: Literal["mac", "encrypt"], sealed: bytes) -> bytes:
    inner, found = MemoryStore(), list[bytes]()
    inner.values[_SPEC.key] = sealed
    SealedStore(inner, scheme, (_SECRET,)).get_many([_SPEC.key], partial(_keep, found), timeout_seconds=1)
    return b"".join(found)


def _sealed(scheme: Literal["mac", "encrypt"]) -> bytes:
    inner = MemoryStore()
    SealedStore(inner, scheme, (_SECRET,)).put_many([Put(_SPEC.key, _PLAIN)], timeout_seconds=1)
    sealed = bytes(inner.values[_SPEC.key])
    must(_opened(scheme, sealed) == _PLAIN, "not opened again")
    return sealed


def _keep(found: list[bytes], _: int, value: memoryview) -> None:
    found.append(bytes(value))


def store_url(data: bytes) -> None:
    """A store's URL, its parts divided by zero bytes around a password; an error never repeats that."""
    before, after, rest, *_ = [*data.decode("utf-8", errors="replace").split("\0"), "", ""]
    for scheme in sorted(REDIS_SCHEMES):
        url = f"{scheme}://user:{before}{_PASSWORD}{after}@{rest}"
        for kind in (url, f"{scheme}://{rest}?sentinel_password={before}{_PASSWORD}{after}"):
            try:
                parse_redis_url(kind)
            except ConfigError as error:
                must(_PASSWORD not in str(error), "a password is told")


TARGETS: Final[dict[str, Target]] = {
    "record": Target(record, [_sealed_record()]),
    "sealed-value": Target(sealed_value, [_sealed(scheme) for scheme in _SCHEMES]),
    "store-url": Target(store_url, [b"\0\0host:6379/0", b"%3a\0%40\0[::1]:1/2?timeout=1", b"\0\0a:1,b/kv-master/0"]),
}
