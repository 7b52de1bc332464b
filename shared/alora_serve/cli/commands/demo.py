"""The command `demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from alora_serve.cli.options import AsJson, Threads
from alora_serve.cli.output import FAILURE_EXIT_CODE, errors_reported

commands = typer.Typer()


@commands.command()
def demo(
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or auto.")] = "float32",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """One conversation with the base model and adapters, measured and compared with stock PEFT. About a minute.

    Starts base prefill, a decode worker and the router as processes of their own on free ports, with a store of their
    own. The base model answers a question about a document; then every process that held the conversation is replaced
    by a fresh one, and an Activated LoRA is asked about it from the KV in the store; so is its plain LoRA twin, which
    must compute everything anew. The adapters' tokens are compared with those of stock PEFT, which computes the same
    prompts cold: exactly in float32; with `--dtype bfloat16`, as far as rounding lets two runs agree.

    Exits with status 1 if any token differs.

    ```
    alora-serve demo
    alora-serve demo --dtype bfloat16
    alora-serve demo --json | jq .adapter_ttft_seconds
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.demo.show import show

        if not show(dtype, threads, as_json=as_json):
            raise typer.Exit(FAILURE_EXIT_CODE)
