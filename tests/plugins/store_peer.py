"""Another process that uses a store, driven line by line, so that tests can stop and kill it wherever they like.

Run as a script it takes a store URL and a budget and obeys JSON commands; :class:`Peer` is the driver's side.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

import psutil

from alora_serve.errors import StoreError
from alora_serve.kv.factory import open_store
from alora_serve.kv.guarded import BreakerState, Direction, Operation, Outcome
from alora_serve.kv.redis_url import TlsFiles
from alora_serve.kv.store import KVStore, Put, StoreKey

PATIENCE_SECONDS = 30.0


class RecordingMetrics:
    """A ``StoreMetrics`` that remembers everything."""

    def __init__(self) -> None:
        self.observed: list[tuple[Operation, Outcome, int]] = []
        self.states: list[tuple[Direction, BreakerState]] = []
        self.retries: dict[Direction, Callable[[], float]] = {}

    def observe(self, operation: Operation, outcome: Outcome, seconds: float, bytes_moved: int) -> None:
        """See ``StoreMetrics``."""
        self.observed.append((operation, outcome, bytes_moved))

    def breaker_state(self, direction: Direction, state: BreakerState) -> None:
        """See ``StoreMetrics``."""
        self.states.append((direction, state))

    def breaker_retry(self, direction: Direction, seconds: Callable[[], float]) -> None:
        """See ``StoreMetrics``."""
        self.retries[direction] = seconds


def key_of(name: str | int) -> StoreKey:
    """A 32-byte key."""
    return StoreKey(hashlib.sha256(str(name).encode()).digest())


def pattern(key: StoreKey, size: int, version: int = 0) -> bytes:
    """Bytes that only this key, size and version have, cheap to make at any size."""
    unit = hashlib.sha256(key + size.to_bytes(8, "little") + version.to_bytes(8, "little")).digest()
    return (unit * (size // len(unit) + 1))[:size]


def read(store: KVStore, keys: Sequence[StoreKey], timeout_seconds: float = PATIENCE_SECONDS) -> dict[int, bytes]:
    """The values that are there, by index."""
    values: dict[int, bytes] = {}

    def sink(index: int, value: memoryview) -> None:
        assert index not in values, "handed out twice"
        values[index] = bytes(value)

    store.get_many(keys, sink, timeout_seconds=timeout_seconds)
    return values


class Peer:
    """A running peer. Always killed at the end of the ``with`` block, stopped or not."""

    def __init__(self, url: str, budget_bytes: int = 64 << 20, *, tls: TlsFiles | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).resolve()),
                url,
                str(budget_bytes),
                json.dumps(asdict(tls or TlsFiles())),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Send a command and wait for its first reply."""
        self.tell(operation, **arguments)
        return self.reply()

    def tell(self, operation: str, **arguments: Any) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
        self.process.stdin.flush()

    def reply(self) -> Any:
        """Wait for the next reply."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer died"
        return json.loads(line)

    def wait_until_stopped(self) -> None:
        """Return when the process has stopped itself."""
        process, until = psutil.Process(self.process.pid), time.monotonic() + PATIENCE_SECONDS
        while process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until, "the peer did not stop itself"
            time.sleep(0.01)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, which works on a stopped process too."""
        self.process.kill()
        self.process.wait()


class _Obedient:
    def __init__(self, url: str, budget_bytes: int, tls: TlsFiles, replies: TextIO) -> None:
        self._replies = replies
        self._url = url
        self._store = open_store(
            url,
            budget_bytes=budget_bytes,
            ttl_seconds=600,
            breaker_failures=5,
            breaker_reset_seconds=1,
            metrics=RecordingMetrics(),
            tls=tls,
        )

    def put(self, names: list[str], size: int, version: int = 0) -> str:
        puts = [Put(key_of(name), pattern(key_of(name), size, version)) for name in names]
        self._store.put_many(puts, timeout_seconds=PATIENCE_SECONDS)
        return "done"

    def get(self, names: list[str]) -> list[str | None]:
        values = read(self._store, [key_of(name) for name in names])
        return [hashlib.sha256(values[index]).hexdigest() if index in values else None for index in range(len(names))]

    def delete(self, names: list[str]) -> str:
        self._store.delete_many([key_of(name) for name in names], timeout_seconds=PATIENCE_SECONDS)
        return "done"

    def stop_while_reading(self, name: str) -> str:
        def sink(index: int, value: memoryview) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

        self._store.get_many([key_of(name)], sink, timeout_seconds=3600)
        return "resumed"

    def stop_while_writing(self) -> str:
        """Hold LMDB's writer lock with a change half made."""
        import lmdb

        root = self._url.removeprefix("lmdb://")
        with lmdb.open(f"{root}/v1", map_size=64 << 20, lib_version=0).begin(write=True) as txn:
            txn.put(b"half", b"made" * 100_000)
            os.kill(os.getpid(), signal.SIGSTOP)
            txn.abort()
        return "resumed"

    def churn(self, names: list[str], size: int) -> str:
        """Put and get until killed; the first round is done when the reply comes."""
        version = 0
        while True:
            self.put(names, size, version)
            self.get(names)
            if version == 0:
                self.say("churning")
            version += 1

    def say(self, reply: Any) -> None:
        print(json.dumps(reply), file=self._replies, flush=True)


def _main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # log lines go where they do not get between the replies
    obedient = _Obedient(sys.argv[1], int(sys.argv[2]), TlsFiles(**json.loads(sys.argv[3])), replies)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(obedient, command.pop("operation"))(**command)
        except StoreError as error:
            reply = {"error": type(error).__name__}
        obedient.say(reply)


if __name__ == "__main__":
    _main()
