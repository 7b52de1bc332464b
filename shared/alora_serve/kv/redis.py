"""``RedisStore``: one key a part on Redis or Valkey: standalone, behind Sentinels, or a Cluster.

The server is the one eviction authority (``maxmemory-policy allkeys-lru``); a value written here also expires by
itself. No command is ever retried: the caller can recompute, and sooner than a retry would answer.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from alora_serve.cores import usable_cores
from alora_serve.errors import StoreError, StoreFullError, StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.redis_connection import Link, LinkPool
from alora_serve.kv.redis_topology import open_topology
from alora_serve.kv.redis_url import TlsFiles, parse_redis_url
from alora_serve.kv.store import Put, Sink, StoreKey

_READS_PER_CHUNK = 8  # about 8 MiB: enough to hide the round trip, few enough to share among connections
_WRITE_BYTES_PER_CHUNK = 8 << 20
_SMALL_PER_CHUNK = 512
_KEY_PREFIX = b"alora:"
_MOVED: Final = (MovedError, AskError, TryAgainError)
_ELSEWHERE: Final = (ReadOnlyError, *_MOVED)
"""A server that answers, and is not the one to ask any more."""

_Chunk = TypeVar("_Chunk")


class RedisStore:
    """A :class:`~alora_serve.kv.store.KVStore` on Redis or Valkey.

    Connects at the first call. One call works over up to ``parallel`` connections at once, the calling thread being one
    of the workers, so no call waits for another one's connections.

    Args:
        url: see :func:`~alora_serve.kv.redis_url.parse_redis_url`.
        tls: for ``rediss``.
        ttl_seconds: a full block not written for so long expires.
        evict_first_ttl_seconds: the same for a partial tail: Redis knows no other order of eviction.
        parallel: connections that one call may use; unset: one a core, but two to four.
        max_value_bytes: a longer value is none of ours: its connection is dropped before it is all in memory.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: float,
        evict_first_ttl_seconds: float | None = None,
        parallel: int | None = None,
        max_value_bytes: int = 64 << 20,
        tls: TlsFiles | None = None,
    ) -> None:
        self._topology = open_topology(parse_redis_url(url), tls or TlsFiles())
        self._ttl_milliseconds = _milliseconds(ttl_seconds)
        self._evict_first_ttl_milliseconds = _milliseconds(
            ttl_seconds / 4 if evict_first_ttl_seconds is None else evict_first_ttl_seconds
        )
        self._max_value_bytes = max_value_bytes
        self._helpers = (parallel or _connections()) - 1
        self._executor = ThreadPoolExecutor(max(self._helpers, 1), thread_name_prefix="redis-store")

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`. Calls the sink from several threads at once."""
        deadline = time.monotonic() + timeout_seconds

        def read(link: Link, chunk: Sequence[int]) -> None:
            with self._translating():
                link.send([(b"GET", _KEY_PREFIX + keys[index]) for index in chunk])
            for index in chunk:
                with self._translating():
                    value = self._found(link)
                if value is not None:
                    with memoryview(value) as view:  # released afterwards, so that a kept one cannot be read
                        sink(index, view)

        self._spread(self._chunks(keys, _READS_PER_CHUNK, deadline), read, deadline)

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        present = [False] * len(keys)
        deadline = time.monotonic() + timeout_seconds

        def ask(link: Link, chunk: Sequence[int]) -> None:
            with self._translating():
                link.send([(b"EXISTS", _KEY_PREFIX + keys[index]) for index in chunk])
                for index in chunk:
                    present[index] = self._found(link) == 1

        self._spread(self._chunks(keys, _SMALL_PER_CHUNK, deadline), ask, deadline)
        return present

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`. Of several puts under one key the last counts."""
        deadline = time.monotonic() + timeout_seconds

        def write(link: Link, chunk: Sequence[Put]) -> None:
            with self._translating():
                link.send([self._set(put) for put in chunk])
                _read_all(link, len(chunk))

        last = list({put.key: put for put in puts}.values())
        placed = self._placed([put.key for put in last], deadline)
        chunks = {pool: _by_bytes([last[index] for index in indices]) for pool, indices in placed.items()}
        self._spread(_by_turns(chunks), write, deadline)

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`."""
        deadline = time.monotonic() + timeout_seconds

        def delete(link: Link, chunk: Sequence[int]) -> None:
            with self._translating():
                link.send([(b"UNLINK", _KEY_PREFIX + keys[index]) for index in chunk])
                _read_all(link, len(chunk))

        self._spread(self._chunks(keys, _SMALL_PER_CHUNK, deadline), delete, deadline)

    def close(self) -> None:
        """See :class:`~alora_serve.kv.store.KVStore`. Calls in progress end by their own deadlines."""
        self._topology.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _set(self, put: Put) -> tuple[bytes | memoryview, ...]:
        ttl = self._evict_first_ttl_milliseconds if put.evict_first else self._ttl_milliseconds
        view = memoryview(put.value)
        return b"SET", _KEY_PREFIX + put.key, view.cast("B") if view.nbytes else b"", b"PX", ttl

    def _placed(self, keys: Sequence[StoreKey], deadline: float) -> dict[LinkPool, list[int]]:
        """Indices of keys by who has them."""
        placed: defaultdict[LinkPool, list[int]] = defaultdict(list)
        with self._translating():
            for index, key in enumerate(keys):
                placed[self._topology.pool_of(_KEY_PREFIX + key, deadline)].append(index)
        return placed

    def _chunks(self, keys: Sequence[StoreKey], size: int, deadline: float) -> list[tuple[LinkPool, list[int]]]:
        return _by_turns(
            {
                pool: [indices[start : start + size] for start in range(0, len(indices), size)]
                for pool, indices in self._placed(keys, deadline).items()
            }
        )

    def _found(self, link: Link) -> Any:
        """A reply about one key; None for a key whose slot has moved: a miss once, then the new place is known."""
        try:
            return link.receive(self._max_value_bytes)
        except _MOVED:
            self._topology.forget()
            return None

    def _spread(
        self, chunks: Sequence[tuple[LinkPool, _Chunk]], work: Callable[[Link, _Chunk], None], deadline: float
    ) -> None:
        """Run ``work`` on every chunk over several connections; after the first error start no further chunk.

        Returns only when no thread works on it any more, and raises the first error.
        """
        waiting = deque(chunks)
        errors: list[BaseException] = []

        def drain() -> None:
            try:
                while not errors:
                    try:
                        chunk = waiting.popleft()
                    except IndexError:
                        return
                    self._work(chunk, work, deadline)
            except BaseException as error:  # noqa: BLE001 - raised by the caller's thread below
                errors.append(error)

        helpers = self._start_helpers(drain, min(self._helpers, len(chunks) - 1))
        drain()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
        if errors:
            raise errors[0]

    def _start_helpers(self, drain: Callable[[], None], count: int) -> list[Future[None]]:
        try:
            return [self._executor.submit(drain) for _ in range(count)]
        except RuntimeError as error:  # its word for: shut down
            raise StoreUnavailableError("the Redis store is closed") from error

    def _work(self, placed: tuple[LinkPool, _Chunk], work: Callable[[Link, _Chunk], None], deadline: float) -> None:
        pool, chunk = placed
        with self._translating():
            link = pool.acquire(deadline)
        try:
            work(link, chunk)
        except BaseException:
            link.disconnect()  # replies may be unread
            raise
        finally:
            pool.release(link)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Turn redis-py's errors into ours, and look anew for a server that is lost, silent or not the one to ask."""
        try:
            with _translated():
                try:
                    yield
                except _ELSEWHERE:
                    self._topology.forget()
                    raise
        except (StoreUnavailableError, StoreTimeoutError):
            self._topology.forget()
            raise


@contextmanager
def _translated() -> Iterator[None]:
    """Keep sinks outside: their errors are their callers'."""
    try:
        yield
    except RedisTimeoutError as error:
        raise StoreTimeoutError(f"Redis did not answer in the time given: {error}") from error
    except (RedisConnectionError, OSError, ClusterDownError) as error:
        raise StoreUnavailableError(f"Redis cannot be reached: {error}") from error
    except OutOfMemoryError as error:
        raise StoreFullError(f"Redis is full: {error}") from error
    except RedisError as error:
        raise StoreError(f"Redis: {error}") from error


def _connections() -> int:
    """Two hide each other's waiting even on one core; more than four would wait for Python's lock to check values."""
    return min(max(usable_cores(), 2), 4)


def _read_all(link: Link, replies: int) -> None:
    """Read every reply, so that the connection stays usable, and raise the first that is an error."""
    refusal: ResponseError | None = None
    for _ in range(replies):
        try:
            link.receive()
        except ResponseError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal


def _by_turns(chunks: Mapping[LinkPool, Sequence[_Chunk]]) -> list[tuple[LinkPool, _Chunk]]:
    """One of each node of a cluster, then the next: all work at once, and a call cut short has done its first keys."""
    longest = max(map(len, chunks.values()), default=0)
    return [(pool, own[turn]) for turn in range(longest) for pool, own in chunks.items() if turn < len(own)]


def _by_bytes(puts: Sequence[Put]) -> list[list[Put]]:
    chunks: list[list[Put]] = []
    room_bytes = 0
    for put in puts:
        size = memoryview(put.value).nbytes
        if not chunks or size > room_bytes or len(chunks[-1]) >= _SMALL_PER_CHUNK:
            chunks.append([])
            room_bytes = _WRITE_BYTES_PER_CHUNK
        chunks[-1].append(put)
        room_bytes -= size
    return chunks


def _milliseconds(seconds: float) -> bytes:
    return str(max(1, round(seconds * 1000))).encode()
