"""``make bench-sealed``: what ``store_protection`` costs, against none, in one run on this machine.

Twice: the store alone (an LMDB, values of a megabyte, bytes a second written and read), and through the whole gRPC
path (first token of an adapter whose conversation is in the store but not in the worker). Rounds alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter
from typing import Literal, get_args

from conversations import REQUESTS, conversation
from harness import Row, Sample, describe_machine, show, write
from main import ADAPTER, ADAPTERS, ask, demo_tokenizer
from rich.console import Console
from systems.served import Deployed, empty_store

from alora_serve.cli.local.deployment import DeploymentOptions
from alora_serve.kv.lmdb import LmdbStore
from alora_serve.kv.sealed import Protection, SealedStore
from alora_serve.kv.store import KVStore, Put, StoreKey
from alora_serve.types import ChatMessage, TokenIds

SECRET = "the secret of this benchmark's store"
PROTECTIONS: tuple[Protection, ...] = get_args(Protection)
VALUES, VALUE_BYTES = 64, 1 << 20
Figure = Literal["write", "read"]


def store_of(protection: Protection, url: str) -> KVStore:
    """A bare store with that protection."""
    bare = LmdbStore(Path(url.removeprefix("lmdb://")), budget_bytes=1 << 30)
    return bare if protection == "none" else SealedStore(bare, protection, (SECRET.encode(),))


def measure_stores(rounds: int) -> dict[Protection, dict[Figure, float]]:
    """Median bytes a second of writing and reading, by protection."""
    rates: dict[tuple[Protection, Figure], list[float]] = defaultdict(list)
    value = os.urandom(VALUE_BYTES)
    keys = [StoreKey(number.to_bytes(32, "big")) for number in range(VALUES)]
    target = bytearray(VALUE_BYTES)

    def copy(index: int, found: memoryview) -> None:
        target[: found.nbytes] = found

    for protection in PROTECTIONS * (rounds + 1):
        with empty_store() as url:
            store = store_of(protection, url)
            began = perf_counter()
            store.put_many([Put(key, value) for key in keys], timeout_seconds=60)
            written = perf_counter()
            store.get_many(keys, copy, timeout_seconds=60)
            read = perf_counter()
            store.close()
        rates[protection, "write"].append(VALUES * VALUE_BYTES / (written - began))
        rates[protection, "read"].append(VALUES * VALUE_BYTES / (read - written))
    return {
        protection: {figure: statistics.median(rates[protection, figure][1:]) for figure in get_args(Figure)}
        for protection in PROTECTIONS
    }


async def measure_first_tokens(tokens: int, rounds: int, console: Console) -> list[Row]:
    """A row a protection: the KV in the store, not in the worker."""
    tokenizer = demo_tokenizer()

    def count(messages: Sequence[ChatMessage]) -> TokenIds:
        found: TokenIds = tokenizer(messages)
        return found

    samples: dict[Protection, list[Sample]] = defaultdict(list)
    fetched: dict[Protection, int] = {}
    async with AsyncExitStack() as stack:
        running = {}
        for protection in PROTECTIONS:
            settings = {"store_protection": protection, "store_secrets": SECRET, "always_fetch": "true"}
            options = DeploymentOptions(adapter_roots=(ADAPTERS,), dtype="float32", settings=settings)
            running[protection] = await stack.enter_async_context(Deployed(options, ()))
        for number in range(rounds + 1):
            messages = conversation(REQUESTS, tokens, seed=tokens + number, count=count)
            for protection in PROTECTIONS:
                client = running[protection].client
                handle = (await client.prefill(messages=messages)).handle
                sample, finished = await ask(client, handle, ADAPTER)
                fetched[protection] = finished.usage.fetched_bytes
                samples[protection].append(sample)
            console.print(f"round {number} of {rounds}", style="dim")
    return [
        Row(protection, len(handle.prefix_tokens), tuple(samples[protection][1:]), fetched[protection])
        for protection in PROTECTIONS
    ]


def main() -> None:
    """Parse flags, measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the conversation")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds after one warm-up")
    parser.add_argument("--json", action="store_true", help="print the file's path alone")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rates = measure_stores(arguments.rounds)
    rows = asyncio.run(measure_first_tokens(arguments.tokens, arguments.rounds, console))
    path = write("sealed", rows, {"store_bytes_per_second": {name: dict(found) for name, found in rates.items()}})
    if not arguments.json:
        console.print(f"{describe_machine()}, float32, SmolLM2-135M-Instruct")
        for protection, found in rates.items():
            console.print(
                f"{protection:8} writes {found['write'] / 1e9:.2f} GB/s, reads {found['read'] / 1e9:.2f} GB/s"
            )
        table = Console(width=None if sys.stdout.isatty() else 150)
        show(rows, baseline="none", console=table, title="First token from the store", by="first_token_seconds")
    print(path)


if __name__ == "__main__":
    main()
