"""Real Redis servers in groups: a Cluster, and a master behind Sentinels; plain, or over mutual TLS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis

from faulty_network import FaultyNetwork, host_and_port
from redis_servers import Certificates, RedisProcess, free_port, make_server, require_redis_server, running, until

SLOTS = 16384
MASTER = "kv-master"


@contextmanager
def cluster(
    directory: Path, *, replicas: int = 0, certificates: Certificates | None = None, far: bool = False
) -> Iterator[list[RedisProcess]]:
    """Three masters, which share the slots, then ``replicas`` for each; up and agreed.

    With certificates, all that they say, to each other too, is over mutual TLS. Those that are ``far`` are reached
    through a network each, but for what they agree on among themselves.
    """
    nodes = []
    over_tls = ("--tls-cluster", "yes", "--tls-replication", "yes") if certificates else ()
    # Soon, where another can take over; else not because a busy machine lets a node wait.
    node_timeout = "1000" if replicas else "15000"
    with ExitStack() as stack:
        for number in range(3 * (1 + replicas)):
            port, bus_port = free_port(), str(free_port())
            network = FaultyNetwork("127.0.0.1", port) if far else None
            arguments = (
                *("--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{number}.conf"),
                *("--cluster-node-timeout", node_timeout, "--cluster-port", bus_port),
            )
            if network is not None:
                of_clients = "--cluster-announce-tls-port" if certificates else "--cluster-announce-port"
                arguments += ("--cluster-announce-ip", "127.0.0.1", "--cluster-announce-bus-port", bus_port)
                arguments += (of_clients, str(host_and_port(network.address)[1]))
            node = make_server(directory, *arguments, *over_tls, port=port, network=network, certificates=certificates)
            nodes.append(stack.enter_context(running(node)))
        _join(nodes, replicas)
        yield nodes


def _join(nodes: Sequence[RedisProcess], replicas: int) -> None:
    first = nodes[0]
    with first.client() as client:
        for node in nodes[1:]:
            bus = node.command[node.command.index("--cluster-port") + 1]
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        until(lambda: len(_cluster_nodes(client)) == len(nodes), "a cluster whose nodes know each other")
    share = SLOTS // 3
    for number, node in enumerate(nodes[:3]):
        last = SLOTS - 1 if number == 2 else (number + 1) * share - 1
        with node.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, last)
    for number, node in enumerate(nodes[3:]):
        with nodes[number // replicas].client() as master, node.client() as client:
            master_id = master.execute_command("CLUSTER", "MYID")
            until(
                lambda client=client, master_id=master_id: (  # type: ignore[misc]  # bound now
                    client.execute_command("CLUSTER", "REPLICATE", master_id) is not None
                ),
                "a replica",
            )
            until(lambda client=client: _follows(client), "a replica that has its master's data")  # type: ignore[misc]
    for node in nodes:
        with node.client() as client:
            until(lambda client=client: _cluster_is_ok(client, len(nodes)), "a cluster in agreement")  # type: ignore[misc]


def _follows(client: redis.Redis) -> bool:
    state: Any = client.info("replication")
    return bool(state["master_link_status"] == "up")


def _cluster_nodes(client: redis.Redis) -> list[str]:
    listed: Any = client.execute_command("CLUSTER", "NODES")
    return list(listed) if isinstance(listed, dict) else listed.decode().splitlines()


def _cluster_is_ok(client: redis.Redis, count: int) -> bool:
    info: Any = client.execute_command("CLUSTER", "INFO")
    text = info if isinstance(info, dict) else dict(line.split(":", 1) for line in info.decode().split("\r\n") if line)
    return text["cluster_state"] == "ok" and int(text["cluster_known_nodes"]) == count


@dataclass(frozen=True, slots=True)
class Watched:
    """A master, its replica, and the Sentinels that watch them."""

    master: RedisProcess
    replica: RedisProcess
    sentinels: list[RedisProcess]
    is_tls: bool

    @property
    def all(self) -> list[RedisProcess]:
        """Every process."""
        return [self.master, self.replica, *self.sentinels]

    @property
    def url(self) -> str:
        """Of the store."""
        hosts = ",".join(f"127.0.0.1:{sentinel.public_port}" for sentinel in self.sentinels)
        return f"redis{'s' if self.is_tls else ''}+sentinel://{hosts}/{MASTER}/0"


@contextmanager
def watched(directory: Path, certificates: Certificates | None = None, *, far: bool = False) -> Iterator[Watched]:
    """A master and a replica under three Sentinels, two of which are enough to promote the replica.

    With certificates, all that they say, to each other too, is over mutual TLS. Those that are ``far`` are reached
    through a network each, by each other too.
    """
    over_tls = ("--tls-replication", "yes") if certificates else ()

    def server(*arguments: str) -> RedisProcess:
        port = free_port()
        network = FaultyNetwork("127.0.0.1", port) if far else None
        made = make_server(directory, *over_tls, *arguments, port=port, network=network, certificates=certificates)
        announced = ("--replica-announce-ip", "127.0.0.1", "--replica-announce-port", str(made.public_port))
        return _from_file(replace(made, command=(*made.command, *announced)))

    with ExitStack() as stack:
        master = stack.enter_context(running(server()))
        replica = stack.enter_context(running(server("--replicaof", "127.0.0.1", str(master.public_port))))
        with replica.client() as client:
            until(lambda: _follows(client), "a replica that has its master's data")
        sentinels = []
        for number in range(3):
            port, file = free_port(), directory / f"sentinel-{number}.conf"
            command = (require_redis_server(), str(file), "--sentinel")
            options = certificates.client_options if certificates else {}
            network = FaultyNetwork("127.0.0.1", port) if far else None
            sentinel = RedisProcess(command, port, directory, options, network)
            file.write_text(
                f"{_listening(port, certificates)}bind 127.0.0.1\ndir {directory}\n"
                f"sentinel announce-ip 127.0.0.1\nsentinel announce-port {sentinel.public_port}\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {master.public_port} 2\n"
                f"sentinel down-after-milliseconds {MASTER} 500\n"
                f"sentinel failover-timeout {MASTER} 3000\n"
            )
            sentinels.append(stack.enter_context(running(sentinel)))
        for sentinel in sentinels:
            with sentinel.client() as client:
                until(lambda client=client: _is_watched(client), "Sentinels that know each other")  # type: ignore[misc]
        yield Watched(master, replica, sentinels, is_tls=certificates is not None)


def _from_file(server: RedisProcess) -> RedisProcess:
    """With its options in a file, where Sentinels write whom it follows, or that it is the master now."""
    program, *words = server.command
    lines = list[str]()
    for word in words:
        if word.startswith("--"):
            lines.append(word.removeprefix("--"))
        else:
            lines[-1] += f' "{word}"'
    file = server.directory / f"server-{server.port}.conf"
    file.write_text("\n".join(lines) + "\n")
    return replace(server, command=(program, str(file)))


def _listening(port: int, certificates: Certificates | None) -> str:
    if certificates is None:
        return f"port {port}\n"
    files = f"tls-ca-cert-file {certificates.ca_file}\ntls-cert-file {certificates.server_file}\n"
    return f"port 0\ntls-port {port}\ntls-replication yes\n{files}tls-key-file {certificates.server_file}\n"


def _is_watched(client: redis.Redis) -> bool:
    state: Any = client.sentinel_master(MASTER)
    return state["num-slaves"] == 1 and state["num-other-sentinels"] == 2
