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
    """A guarded question about a document: a check by an adapter at every step, measured, compared with stock PEFT.

    Starts base prefill, a decode worker and the router as processes of their own on free ports, with a store of their
    own, and runs the pipeline of `examples/rag_guard.py`: is it a jailbreak, what does it ask in full, does the
    document say? The base model answers; then every process that held the conversation is replaced by a fresh one, and
    is the answer supported, and certain? Each check is an Activated LoRA that reads the conversation's KV. Their plain
    LoRA twins, which must compute everything anew, are asked the same. The adapters' tokens are compared with those of
    stock PEFT, which computes the same prompts cold: exactly in float32; with `--dtype bfloat16`, as far as rounding
    lets two runs agree. About two minutes on two cores; its last line, and `seconds` of `--json`, say how long it took.

    Exits with status 1 if any token differs.

    ```
    alora-serve demo
    alora-serve demo --dtype bfloat16
    alora-serve demo --json | jq '.steps[].spent'
    ```
    """
    with errors_reported(as_json=as_json):
        from alora_serve.cli.demo.show import show

        if not show(dtype, threads, as_json=as_json):
            raise typer.Exit(FAILURE_EXIT_CODE)
