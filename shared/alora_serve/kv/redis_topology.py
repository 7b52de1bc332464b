"""Where keys are: on one server, on the nodes of a cluster, or on whichever server Sentinels call the master."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError

from alora_serve.errors import StoreTimeoutError, StoreUnavailableError
from alora_serve.kv.redis_connection import LinkPool
from alora_serve.kv.redis_url import Address, RedisUrl, TlsFiles

_ASK_SECONDS: Final = 0.5
"""Longest wait for one node or Sentinel to say where keys are: another may know."""


class Topology(Protocol):
    """Knows who has a key. Thread-safe. Raises redis-py's errors and the store's."""

    def pool_of(self, key: bytes, deadline: float) -> LinkPool:
        """Connections to the server that has this key; may ask around until ``deadline``."""

    def forget(self) -> None:
        """A server said, or its silence did, that keys are elsewhere now: ask again at the next call."""

    def close(self) -> None:
        """Disconnect. Idempotent."""


def open_topology(url: RedisUrl, tls: TlsFiles) -> Topology:
    """Of this URL; connects to nothing yet."""
    match url.kind:
        case "cluster":
            return Cluster(url, tls)
        case "sentinel":
            return Sentinels(url, tls)
    return Standalone(url, tls)


class Standalone:
    """One server."""

    def __init__(self, url: RedisUrl, tls: TlsFiles) -> None:
        self._pool = LinkPool(url, url.addresses[0] if url.addresses else None, tls)

    def pool_of(self, key: bytes, deadline: float) -> LinkPool:
        """See :class:`Topology`."""
        return self._pool

    def forget(self) -> None:
        """See :class:`Topology`."""

    def close(self) -> None:
        """See :class:`Topology`."""
        self._pool.close()


class _Pools:
    """Connections by address, made when first needed."""

    def __init__(self, url: RedisUrl, tls: TlsFiles) -> None:
        self._url, self._tls = url, tls
        self._pools: dict[Address, LinkPool] = {}
        self._closed = False
        self._lock = threading.Lock()

    def at(self, address: Address) -> LinkPool:
        with self._lock:
            if self._closed:
                raise StoreUnavailableError("the Redis store is closed")
            if address not in self._pools:
                self._pools[address] = LinkPool(self._url, address, self._tls)
            return self._pools[address]

    def keep(self, addresses: Sequence[Address]) -> None:
        """Close the others."""
        with self._lock:
            left = self._pools.keys() - {*addresses}
            closed = [self._pools.pop(address) for address in left]
        for pool in closed:
            pool.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.keep(())


def _ask(pools: _Pools, addresses: list[Address], command: tuple[bytes, ...], deadline: float) -> tuple[Address, Any]:
    """The first answer that one of ``addresses`` gives, and whose it is.

    Who gives none becomes the last of them: a call may have no more time than waiting for one takes, and the next one
    must not wait for the same again.
    """
    failure: Exception | None = None
    for address in tuple(addresses):
        pool = pools.at(address)
        try:
            link = pool.acquire(min(deadline, time.monotonic() + _ASK_SECONDS))
            try:
                link.send([command])
                answer = link.receive()
            except BaseException:
                link.disconnect()
                raise
            finally:
                pool.release(link)
        except (RedisError, OSError, StoreUnavailableError) as error:
            failure = error
            addresses.remove(address)
            addresses.append(address)
            continue
        if answer is not None:
            return address, answer
    raise StoreUnavailableError(f"none of {len(addresses)} addresses says where keys are: {failure}") from failure


@contextmanager
def _held(lock: threading.Lock, deadline: float) -> Iterator[None]:
    """One call asks where keys are, the others wait for its answer, none of them longer than it may."""
    if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise StoreTimeoutError("nobody said in time where keys are in Redis")
    try:
        yield
    finally:
        lock.release()


class Sentinels:
    """Whichever server they call the master."""

    def __init__(self, url: RedisUrl, tls: TlsFiles) -> None:
        self._url = url
        self._sentinels = _Pools(url.for_sentinels(), tls)
        self._servers = _Pools(url, tls)
        self._asked = list(url.addresses)
        self._master: Address | None = None
        self._lock = threading.Lock()

    def pool_of(self, key: bytes, deadline: float) -> LinkPool:
        """See :class:`Topology`."""
        master = self._master
        if master is None:
            with _held(self._lock, deadline):
                master = self._master or self._ask_for_master(deadline)
                self._master = master
        return self._servers.at(master)

    def forget(self) -> None:
        """See :class:`Topology`."""
        self._master = None

    def close(self) -> None:
        """See :class:`Topology`."""
        self._servers.close()
        self._sentinels.close()

    def _ask_for_master(self, deadline: float) -> Address:
        command = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._url.master.encode())
        _, (host, port) = _ask(self._sentinels, self._asked, command, deadline)
        master = (host.decode(), int(port))
        self._servers.keep((master,))
        return master


class Cluster:
    """The node that has a key's slot. A node that is lost is asked around for at the next call."""

    def __init__(self, url: RedisUrl, tls: TlsFiles) -> None:
        self._url = url
        self._nodes = _Pools(url, tls)
        self._asked = list(url.addresses)
        self._slots: list[Address | None] | None = None
        self._lock = threading.Lock()

    def pool_of(self, key: bytes, deadline: float) -> LinkPool:
        """See :class:`Topology`."""
        slots = self._slots
        if slots is None:
            with _held(self._lock, deadline):
                slots = self._slots or self._ask_for_slots(deadline)
                self._slots = slots
        address = slots[key_slot(key)]
        if address is None:
            self.forget()
            raise StoreUnavailableError(f"no node of the cluster has slot {key_slot(key)}")
        return self._nodes.at(address)

    def forget(self) -> None:
        """See :class:`Topology`."""
        self._slots = None

    def close(self) -> None:
        """See :class:`Topology`."""
        self._nodes.close()

    def _ask_for_slots(self, deadline: float) -> list[Address | None]:
        by, ranges = _ask(self._nodes, self._asked, (b"CLUSTER", b"SLOTS"), deadline)
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in ranges:
            # A node that does not know its own name leaves it out: it is who was asked.
            address = (host.decode() if host else by[0], int(port))
            slots[first : last + 1] = [address] * (last + 1 - first)
        nodes = dict.fromkeys(address for address in slots if address is not None)
        self._nodes.keep(tuple(nodes))
        still_there = (address for address in self._asked if address in nodes)
        self._asked = list(dict.fromkeys((*still_there, *nodes, *self._url.addresses)))
        return slots
