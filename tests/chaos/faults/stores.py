"""Valkey and Redis servers that die, fill up, forget, lie or answer late, while clients read what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from deployment import deployed
from faults.conversations import new_conversations
from faults.harness import QUICK, Chaos, Load, Row, Scenario, questions
from faults.server_faults import UNAVAILABLE, Fault, expired, of_groups, of_networks, of_servers, without_a_master
from faults.store_harness import (
    FORGETFUL,
    PATIENCE_SECONDS,
    PEACE_SECONDS,
    USED_AGAIN_SECONDS,
    seconds_until_used,
    under,
)
from faulty_network import FaultyNetwork
from redis_groups import cluster, watched
from redis_servers import (
    Certificates,
    free_port,
    make_certificates,
    tls_server,
    valkey_server,
)

SHORT: Final = ("refuses connections", "100 ms away", "out of memory", "node lost", "master lost")
"""Of all faults, those of a short run: one of each kind that a store recovers from in another way."""


async def valkey_faults(chaos: Chaos) -> list[Row]:
    """One Valkey behind one network, and all that can become of either."""
    with valkey_server() as valkey, FaultyNetwork(valkey.host, valkey.port) as network:
        faults = {**of_networks([network]), **of_servers(chaos, [valkey], alone=True)}
        return await all_faults(chaos, faults, f"redis://{network.address}/0", "store {}")


async def mutual_tls_faults(chaos: Chaos) -> list[Row]:
    """The same of a Redis that speaks TLS alone, and to nobody without a certificate."""
    directory = chaos.place("mutual TLS")
    files = make_certificates(directory)
    with tls_server(directory, files, mutual=True) as redis, FaultyNetwork("127.0.0.1", redis.port) as network:
        faults = {**of_networks([network]), **of_servers(chaos, [redis], alone=True)}
        url = f"rediss://{network.address}/0"
        return await all_faults(chaos, faults, url, "store {}, over mutual TLS", showing(files))


def showing(files: Certificates) -> dict[str, str]:
    """Settings of services that show a certificate to the store."""
    client = str(files.client_file)
    return {"store_tls_ca_file": str(files.ca_file), "store_tls_cert_file": client, "store_tls_key_file": client}


async def all_faults(
    chaos: Chaos, faults: Mapping[str, Fault], url: str, called: str, settings: Mapping[str, str] | None = None
) -> list[Row]:
    """One fault after the other, beneath one deployment; ``called`` makes rows' names of the faults'."""
    async with deployed(chaos.model, url, workers=2, **(settings or {}), **FORGETFUL, **QUICK) as running:
        expected, seconds = await questions(running, tokens=40), chaos.pick(2.0, 5.0)
        return [
            await under(chaos, running, called.format(name), fault.done, seconds, expected, fault.met)
            for name, fault in faults.items()
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
            before = await UNAVAILABLE(running)
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
            load.tally.expect(await UNAVAILABLE(running) > before, "no service met the fault")
            return [
                load.tally.row("store killed and started empty", store_used_again_seconds=max(used_again)),
                fresh.row("store killed and started empty: new conversations"),
            ]
    finally:
        valkey.terminate()


async def certificate_expired(chaos: Chaos) -> list[Row]:
    """A Redis over TLS shows a certificate that has expired, and drops every connection made before.

    Services fetch what they would by default: where computing has been faster lately, they do not.
    """
    directory = chaos.place("certificate expired")
    certificates = make_certificates(directory)
    with tls_server(directory, certificates, mutual=False) as server:
        url = f"rediss://127.0.0.1:{server.port}/0"
        tls = {"store_tls_ca_file": str(certificates.ca_file)}
        settings = {**tls, **FORGETFUL, "always_fetch": "false"}
        async with deployed(chaos.model, url, workers=2, **settings, **QUICK) as running:
            expected, name = await questions(running, tokens=40), "store's certificate expired"
            fault = expired([server], certificates)
            return [await under(chaos, running, name, fault, chaos.pick(2.0, 5.0), expected, UNAVAILABLE)]


async def cluster_faults(chaos: Chaos) -> list[Row]:
    """What can become of a Redis Cluster over mutual TLS, and of the networks before its nodes; last, SIGKILL of one
    master, whose replica takes over."""
    directory = chaos.place("cluster faults")
    files = make_certificates(directory)
    with cluster(directory, replicas=1, certificates=files, far=True) as nodes:
        url = f"rediss+cluster://127.0.0.1:{nodes[1].public_port},127.0.0.1:{nodes[2].public_port}"
        faults = {
            **of_servers(chaos, nodes[:3], alone=False),
            **of_groups(nodes, nodes, files),
            "node lost": Fault(without_a_master(nodes), UNAVAILABLE),
        }
        return await all_faults(chaos, faults, url, "cluster: {}", showing(files))


async def sentinel_faults(chaos: Chaos) -> list[Row]:
    """What can become of a master whom Sentinels watch, over mutual TLS, and of the networks before all of them; last,
    its SIGKILL."""
    directory = chaos.place("sentinel faults")
    files = make_certificates(directory)
    with watched(directory, files, far=True) as servers:
        either = [servers.master, servers.replica]
        faults = {
            **of_servers(chaos, [servers.master], alone=False),
            **of_groups(servers.all, either, files),
            "master lost": Fault(without_a_master(either), UNAVAILABLE),
        }
        return await all_faults(chaos, faults, servers.url, "sentinels: {}", showing(files))


SCENARIOS: Final[dict[str, Scenario]] = {
    "valkey faults": valkey_faults,
    "mutual TLS": mutual_tls_faults,
    "store killed": store_killed,
    "certificate expired": certificate_expired,
    "cluster faults": cluster_faults,
    "sentinel faults": sentinel_faults,
}
