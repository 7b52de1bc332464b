"""Podman, asked on its command line: the one engine of the container stage (tests/containers/inside.sh)."""

from __future__ import annotations

import asyncio
import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from alora_serve.cli.probe import health_of
from alora_serve.errors import UnavailableError

LIMIT_SECONDS = 300


def podman(*arguments: str, given: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one command; fails with what it prints."""
    command = ["podman", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done


@dataclass(frozen=True, slots=True)
class Container:
    """A container, by name or id."""

    name: str

    def inspect(self) -> dict[str, Any]:
        """All that the engine knows of it."""
        [found] = json.loads(podman("container", "inspect", self.name).stdout)
        return dict(found)

    @property
    def host_pid(self) -> int:
        """Its first process, as this namespace sees it; 0 while it does not run."""
        return int(self.inspect()["State"]["Pid"])

    def address(self, network: str) -> str:
        """Where it, or the pod that it is in, is in a network; empty while it does not run."""
        found = self.inspect()
        if found["Pod"]:
            pod = json.loads(podman("pod", "inspect", found["Pod"]).stdout)
            found = Container(pod["InfraContainerID"]).inspect()
        return str(found["NetworkSettings"]["Networks"][network]["IPAddress"])

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints in it, errors too."""
        done = podman("exec", self.name, *command, check=check)
        return done.stdout + done.stderr

    def logs(self) -> str:
        """What it has printed."""
        done = podman("logs", self.name, check=False)
        return done.stdout + done.stderr


async def until_serving(container: Container, network: str, service: str, port: int = 50052) -> None:
    """Ask for the health of a service in a container until it serves."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while True:
            with suppress(UnavailableError):
                at = f"{container.address(network)}:{port}"
                if await asyncio.to_thread(health_of, at, service, 5.0) == "SERVING":
                    return
            await asyncio.sleep(1)


@dataclass(frozen=True, slots=True)
class Confinement:
    """What a container's processes may do, as the kernel tells them.

    Attributes:
        capabilities: the effective ones.
        gains_privileges: whether a program may have more than its parent.
        refused: what writing to the root file system says.
        memory_limit_bytes: of its cgroup.
    """

    user: int
    group: int
    capabilities: int
    gains_privileges: bool
    refused: str
    memory_limit_bytes: int


def confinement(container: Container) -> Confinement:
    """Asked from inside."""
    status = dict(
        line.split(":\t", 1) for line in container.run("cat", "/proc/self/status").splitlines() if ":\t" in line
    )
    return Confinement(
        user=int(status["Uid"].split()[0]),
        group=int(status["Gid"].split()[0]),
        capabilities=int(status["CapEff"], 16),
        gains_privileges=status["NoNewPrivs"] == "0",
        refused=container.run("touch", "/written", check=False),
        memory_limit_bytes=int(container.run("cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes")),
    )
