"""An LMDB whose file system is full, or whose file is cut short."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

from deployment import deployed
from faults.conversations import new_conversations
from faults.harness import DEFAULT, QUICK, CannotBreakError, Chaos, Load, Row, Scenario, questions
from faults.server_faults import FULL
from faults.store_harness import FORGETFUL, PEACE_SECONDS, seconds_until_used, under


@contextmanager
def small_file_system(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Memory mounted there.

    Raises:
        CannotBreakError: we may not mount.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        raise CannotBreakError(f"a full file system needs the right to mount one: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@asynccontextmanager
async def filled(directory: Path) -> AsyncIterator[None]:
    """No byte is left on the file system."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


async def lmdb_full(chaos: Chaos) -> list[Row]:
    """The file system that an LMDB lies on is full."""
    with small_file_system(chaos.place("lmdb full"), 48 << 20) as directory:
        store = directory / "kv"
        async with deployed(chaos.model, f"lmdb://{store}", workers=2, **FORGETFUL, **QUICK) as running:
            expected, seconds = await questions(running, tokens=40), chaos.pick(2.0, 5.0)
            return [await under(chaos, running, "LMDB full", filled(directory), seconds, expected, FULL)]


def truncate(store: Path) -> None:
    """Cut the data file to half its length."""
    data = store / "v1" / "data.mdb"
    os.truncate(data, data.stat().st_size // 2 // 4096 * 4096)


async def lmdb_truncated_while_stopped(chaos: Chaos) -> list[Row]:
    """Half of an LMDB is missing when everything is started again."""
    store = chaos.place("lmdb truncated while stopped")
    url, rng = f"lmdb://{store}", chaos.rng("load")
    async with deployed(chaos.model, url, **FORGETFUL, **QUICK) as running:
        expected = await questions(running, tokens=40)
    await asyncio.to_thread(truncate, store)
    async with deployed(chaos.model, url, workers=2, **FORGETFUL, **QUICK) as running:
        load = Load(running.local.router_address, expected, rng)
        async with new_conversations(running, expected) as fresh, load.running() as tally:
            tally.strike()
            used_again = await seconds_until_used(running)
            await asyncio.sleep(PEACE_SECONDS)
        tally.add(fresh)
        tally.expect(used_again != float("inf"), "the store was not used")
        tally.expect((store / "v1.aside").is_dir(), "what was cut short was not set aside")
        return [load.tally.row("LMDB truncated while stopped", store_used_again_seconds=used_again)]


async def lmdb_truncated_live(chaos: Chaos) -> list[Row]:
    """Half of an LMDB goes while it is read: who touches what is gone dies, and its requests do not."""
    store = chaos.place("lmdb truncated live")
    async with deployed(chaos.model, f"lmdb://{store}", workers=2, **FORGETFUL, **QUICK) as running:
        expected = await questions(running, tokens=40)
        load = Load(running.local.router_address, expected, chaos.rng("load"))
        deaths = 0
        async with load.running(DEFAULT) as tally:  # the only base prefill may die as well
            for _ in range(chaos.pick(1, 3)):
                await asyncio.sleep(PEACE_SECONDS)
                before = {name: listening.pid for name, listening in running.local.processes.items()}
                tally.strike()
                await asyncio.to_thread(truncate, store)
                await asyncio.sleep(4)
                await running.local.wait_ready()
                deaths += sum(running.local.processes[name].pid != pid for name, pid in before.items())
        is_aside = (store / "v1.aside").is_dir()
        load.tally.expect(deaths > 0 or is_aside, "no process touched what was missing, and none found out")
        return [load.tally.row("LMDB truncated live", processes_that_died=deaths)]


SCENARIOS: Final[dict[str, Scenario]] = {
    "lmdb full": lmdb_full,
    "lmdb truncated while stopped": lmdb_truncated_while_stopped,
    "lmdb truncated live": lmdb_truncated_live,
}
