"""The demo's story: real processes, one conversation through the public API, measured, then compared with PEFT."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]  # the package has no stubs

from alora_serve.cli.demo.calls import timed_answer, timed_prefill
from alora_serve.cli.demo.reference import compare_with_peft
from alora_serve.cli.demo.result import Answer, DemoResult, Row
from alora_serve.cli.demo.script import ADAPTER, LORA_TWIN, DemoScript
from alora_serve.cli.demo.view import View
from alora_serve.cli.local import DeploymentOptions, LocalDeployment, machine
from alora_serve.cli.local.deployment import PREFILL
from alora_serve.cli.local.store_room import place_store
from alora_serve.client import AdapterInfo, AsyncClient, ChatMessage
from alora_serve.errors import AloraServeError, ConfigError
from alora_serve.kv.factory import lmdb_root
from alora_serve.model.demo_model import demo_model_path

STORE_BYTES: Final = 1 << 30
ANSWER_TOKENS: Final = 64
VERDICT_TOKENS: Final = 8
_WARM_UP: Final = (ChatMessage("system", "Answer in one word."), ChatMessage("user", "Name a colour."))
"""Shares no block with the conversation, not even the one of the template's own system turn."""


async def run_demo(script: DemoScript, options: DeploymentOptions, view: View) -> DemoResult:
    """Run the whole demo; about a minute.

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
            async with AsyncClient(deployment.router_address) as client:
                told = await _tell(script, deployment, client, view)
            threads = deployment.settings.threads or machine.usable_cores()
            view.doing("stopping the services")
    view.doing("computing the same prompts with stock PEFT")
    checks, versions = await compare_with_peft(
        [answer for answer in told.answers if answer.adapter],
        model=demo_model_path(),
        adapter_root=script.adapter_root,
        dtype=told.dtype,
        threads=threads,
    )
    return DemoResult(
        cold_prefill=told.cold,
        warm_prefill=told.warm,
        adapter=told.adapter,
        lora=told.lora,
        answers=told.answers,
        checks=checks,
        dtype=told.dtype,
        threads=threads,
        versions={"alora-serve": version("alora-serve"), **versions},
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """What the services answered and took."""

    cold: Row
    warm: Row
    adapter: Row
    lora: Row
    answers: tuple[Answer, ...]
    dtype: str


async def _tell(script: DemoScript, deployment: LocalDeployment, client: AsyncClient, view: View) -> _Told:
    model = await client.get_model()
    adapter, twin = await _adapters(client)
    for message in script.opening:
        view.turn(message)

    view.doing("cold prefill")
    await _warm_up(client)
    cold, handle = await timed_prefill(client, "prefill, nothing stored", script.opening)
    view.answering()
    answer = await timed_answer(client, handle, adapter=None, model=model, max_tokens=ANSWER_TOKENS, on_text=view.text)
    view.answered(answer)

    view.note("base prefill and the worker are replaced by fresh processes: from here on, only the store remembers")
    view.doing("starting fresh processes")
    await deployment.restart(PREFILL, *deployment.worker_names)
    await _warm_up(client)
    conversation = (*script.opening, ChatMessage("assistant", answer.text))
    warm, handle = await timed_prefill(client, "prefill, turns stored", conversation)
    view.note(
        "does the user try to break the rules? an Activated LoRA is asked, and its plain LoRA twin, which changes "
        "every token, so that stored KV is of no use to it"
    )
    first = await timed_answer(client, handle, adapter=adapter, model=model, max_tokens=VERDICT_TOKENS)
    view.answered(first)
    view.doing(f"asking {twin.name}, a plain LoRA, which computes the whole conversation anew")
    lora = await timed_answer(client, handle, adapter=twin, model=model, max_tokens=VERDICT_TOKENS)
    view.answered(lora)

    view.turn(script.follow_up)
    _, handle = await timed_prefill(client, "second turn", (*conversation, script.follow_up))
    second = await timed_answer(client, handle, adapter=adapter, model=model, max_tokens=VERDICT_TOKENS)
    view.answered(second)
    if second.text.strip() == "yes":
        view.note("an application would refuse here; the base model is not asked")
    return _Told(
        cold,
        warm,
        Row("aLoRA, first token", first.ttft_seconds, first.usage),
        Row("plain LoRA, first token", lora.ttft_seconds, lora.usage),
        (answer, first, lora, second),
        model.dtype,
    )


async def _adapters(client: AsyncClient) -> tuple[AdapterInfo, AdapterInfo]:
    """The adapter and its twin, as listed.

    Raises:
        ConfigError: one of them cannot be served.
    """
    listed = {adapter.name: adapter for adapter in await client.list_adapters()}
    for name in (ADAPTER, LORA_TWIN):
        problem = listed[name].problem if name in listed else "not listed"
        if problem:
            raise ConfigError(f"the demo's adapter {name} cannot be served: {problem}")
    return listed[ADAPTER], listed[LORA_TWIN]


async def _warm_up(client: AsyncClient) -> None:
    """What a process does once in its life, such as reading adapters, is not what the demo measures.

    Raises:
        AloraServeError: a target failed.
    """
    for result in await client.fanout(_WARM_UP, [None, ADAPTER, LORA_TWIN], max_tokens=2).results():
        if isinstance(result, AloraServeError):
            raise result


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
