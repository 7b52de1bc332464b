"""Parsers of what lies in the store, and of where it is."""

from __future__ import annotations

from functools import partial
from typing import Final, Literal

from alora_serve.errors import (
    ConfigError,
)
from alora_serve.kv.layout import KVLayout
from alora_serve.kv.record import HEADER_BYTES, RecordRejected, RecordSpec, open_record, seal
from alora_serve.kv.redis_url import parse_redis_url
from alora_serve.kv.sealed import SealedStore
from alora_serve.kv.store import StoreKey
from fuzz_targets.target import Target, must
from in_process import MemoryStore

_SECRET: Final = b"a secret of the fuzz targets"
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
    """A protected value of the store; nothing that was not sealed here comes out."""
    for scheme in _SCHEMES:
        inner = MemoryStore()
        inner.values[_SPEC.key] = data
        store, found = SealedStore(inner, scheme, (_SECRET,)), list[bytes]()
        store.get_many([_SPEC.key], partial(_keep, found), timeout_seconds=1)
        must(found in ([b""], []), "forged")


def _keep(found: list[bytes], _: int, value: memoryview) -> None:
    found.append(bytes(value))


def store_url(data: bytes) -> None:
    """A store's URL; an error never repeats a password."""
    try:
        parse_redis_url("redis://" + data.decode("utf-8", errors="replace"))
    except ConfigError:
        return


TARGETS: Final[dict[str, Target]] = {
    "record": Target(record, [_sealed_record()]),
    "sealed-value": Target(sealed_value, [b"aLSVm" + bytes(80), b"aLSVe" + bytes(80)]),
    "store-url": Target(store_url, [b"user:password@host:6379/0?timeout=1", b"[::1]:1/2"]),
}
