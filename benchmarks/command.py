"""What a benchmark's command does around its measuring: says on what it runs, prints the file, or one line of error."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from harness import describe_machine
from peers.build_llama import BuildError
from rich.console import Console

from alora_serve.errors import ConfigError


def run_command(run: Callable[[argparse.Namespace, Console], Awaitable[Path]], arguments: argparse.Namespace) -> None:
    """Run ``run`` to its end; it returns the file that it wrote. ``arguments.json`` leaves out all but that."""
    console = Console(stderr=True)
    if not arguments.json:
        console.print(describe_machine())

    async def measured() -> Path:
        return await run(arguments, console)

    try:
        print(asyncio.run(measured()))
    except (BuildError, ConfigError) as error:
        sys.exit(str(error))
