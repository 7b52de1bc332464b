"""Runs the demo for a person or for a machine."""

from __future__ import annotations

import asyncio
import signal
from time import monotonic

from alora_serve.cli.demo.run import run_demo
from alora_serve.cli.demo.script import DemoScript
from alora_serve.cli.demo.view import ProgressView, RichView
from alora_serve.cli.local import DeploymentOptions
from alora_serve.cli.output import console, print_json
from alora_serve.model.demo_model import ensure_demo_model


def show(dtype: str | None, threads: int | None, *, as_json: bool) -> bool:
    """Run it and print the result; whether all tokens were those of PEFT.

    Raises:
        AloraServeError: it could not run; says why.
        KeyboardInterrupt: it was interrupted, by SIGTERM or SIGHUP as well; nothing is left behind.
    """
    began = monotonic()
    script = DemoScript.load()
    options = DeploymentOptions(dtype=dtype, threads=threads)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if as_json:
        err = console(stderr=True)
        ensure_demo_model(console=err)
        result = asyncio.run(run_demo(script, options, ProgressView(err)))
        print_json({**result.to_json(), "seconds": monotonic() - began})
        return result.equal_to_peft
    out = console()
    ensure_demo_model(console=out)
    with out.status("starting") as status:
        view = RichView(out, status)
        result = asyncio.run(run_demo(script, options, view))
        view.result(result, monotonic() - began)
    return result.equal_to_peft


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
