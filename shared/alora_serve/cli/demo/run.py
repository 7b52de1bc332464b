"""The demo's story: real processes, one guarded question through the public API, measured, compared with PEFT."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]  # the package has no stubs

from alora_serve.cli.demo.calls import free_answer, warm_up
from alora_serve.cli.demo.reference import compare_with_peft
from alora_serve.cli.demo.result import Answer, DemoResult
from alora_serve.cli.demo.script import DemoScript, Reply
from alora_serve.cli.demo.view import View
from alora_serve.cli.local import DeploymentOptions, LocalDeployment
from alora_serve.cli.local.deployment import PREFILL
from alora_serve.cli.local.store_room import place_store
from alora_serve.cli.pipeline.meter import Meter
from alora_serve.cli.pipeline.result import Report, Step
from alora_serve.client import Client
from alora_serve.cores import usable_cores
from alora_serve.errors import ConfigError
from alora_serve.kv.factory import lmdb_root
from alora_serve.model.demo_model import demo_model_path

STORE_BYTES: Final = 1 << 30
CHECKED_TOKENS: Final = 32
"""Of each answer, at most."""


async def run_demo(script: DemoScript, options: DeploymentOptions, view: View) -> DemoResult:
    """Run the whole demo; about two minutes.

    Args:
        script: what is said.
        options: dtype and threads; model, store and adapters are the demo's own.
        view: shows it.

    Raises:
        ConfigError: the machine, or a service that did not start.
        AloraServeError: a call failed.
    """
    with temporary_store() as store_url:
        options = replace(
            options,
            model="demo",
            store_url=store_url,
            adapter_roots=(script.adapter_root,),
            settings={**options.settings, "store_budget_bytes": str(STORE_BYTES)},
        )
        view.doing("starting base prefill, a decode worker and the router")
        async with LocalDeployment(options, emit=view.process) as deployment:
            view.listening(deployment.processes, script.source)
            loop = asyncio.get_running_loop()

            def replace_processes() -> None:
                restarted = deployment.restart(PREFILL, *deployment.worker_names)
                asyncio.run_coroutine_threadsafe(restarted, loop).result()

            # Left by an interrupt, the client is closed, and so the thread's call ends.
            with Client(deployment.router_address) as client:
                told = await asyncio.to_thread(_tell, script, client, replace_processes, view)
            threads = deployment.settings.threads or usable_cores()
            view.doing("stopping the services")
    view.doing("computing the same prompts with stock PEFT")
    checks, versions = await compare_with_peft(
        told.answers, model=demo_model_path(), adapter_root=script.adapter_root, dtype=told.dtype, threads=threads
    )
    return DemoResult(
        reply=told.reply.text,
        warnings=tuple(told.reply.warnings),
        report=told.report,
        checks=checks,
        dtype=told.dtype,
        threads=threads,
        versions={"alora-serve": version("alora-serve"), **versions},
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """What the services answered and took."""

    reply: Reply
    report: Report
    answers: tuple[Answer, ...]
    dtype: str


def _tell(script: DemoScript, client: Client, replace_processes: Callable[[], None], view: View) -> _Told:
    def on_step(step: Step) -> None:
        view.step(step)
        if not step.intrinsics and step.spent.generated_tokens:
            view.note("base prefill and worker are replaced by fresh processes: from here on, only the store remembers")
            view.doing("starting fresh processes")
            replace_processes()
            warm_up(client, (*script.intrinsics, *script.twins))
            view.doing("asking")

    meter = Meter(client, on_step=on_step)
    view.doing("reading the adapters")
    if missing := meter.prepare(script.intrinsics):
        raise ConfigError(f"the demo's adapters {', '.join(missing)} cannot be served: see `alora-serve adapters list`")
    warm_up(client, (*script.intrinsics, *script.twins))
    for message in script.messages:
        view.turn(message)
    view.doing("asking")
    reply = script.pipeline(meter, script.messages)
    view.reply(reply.text, reply.warnings)

    view.doing("asking the plain LoRA twins, which change every token and so compute the whole conversation anew")
    report = meter.report(recompute=True)
    view.doing("asking each adapter once more, bound to no schema, to compare it with PEFT")
    model, adapters = client.get_model(), {adapter.name: adapter for adapter in client.list_adapters()}
    answers = (
        free_answer(client, prompt.handle, adapters[name], model, max_tokens=CHECKED_TOKENS)
        for name, prompt in meter.asked
        if prompt.handle is not None
    )
    return _Told(reply, report, tuple(answers), model.dtype)


@contextmanager
def temporary_store() -> Iterator[str]:
    """The URL of an empty LMDB store where the default one would be, gone afterwards.

    What demos that were killed left behind goes first: it would fill the memory.
    """
    parent = lmdb_root(place_store("lmdb:", STORE_BYTES).url).parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"alora-serve-{os.getuid()}-demo-"
    for left in parent.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{prefix}{os.getpid()}-") as directory:
        yield f"lmdb://{Path(directory).resolve()}"
