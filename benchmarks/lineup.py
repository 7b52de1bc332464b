"""Who takes part in a run: every system by a short name, made ready with the same model, dtype and adapters."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from adapters import B_STANDARD_DEVIATION, Adapter, Kind, ensure_adapters
from conversations import Renderer
from correctness import Answers
from harness import REPOSITORY, Row
from peers.build_llama import LlamaBuild, ensure_llama
from peers.llama_files import ensure_adapter_files, ensure_model_file
from rich.console import Console
from rich.progress import Progress
from systems.base import System
from systems.child import ChildSystem
from systems.engine import EngineInProcess
from systems.llama import LlamaServer
from systems.llama_settings import (
    BEST_CASE,
    CACHE_KEPT,
    EIGHT_CLIENTS,
    EIGHT_CLIENTS_BEST,
    FIVE_CLIENTS,
    FIVE_CLIENTS_BEST,
    HALF_KV,
    LlamaSettings,
)
from systems.peft import PeftAlora, PeftLora
from systems.served import Deployed, Served, ServedResident, ServedTwins

from alora_serve.cli.local.deployment import DeploymentOptions
from alora_serve.cores import usable_cores
from alora_serve.model.demo_model import ensure_demo_model
from alora_serve.model.device import device_name, native_dtype, open_device

ADAPTER_ROOT: Final = REPOSITORY / "build" / "bench" / "adapters"
LLAMA: Final[Mapping[str, LlamaSettings]] = {
    "llama": BEST_CASE,
    "llama-kept": CACHE_KEPT,
    "llama-f16": HALF_KV,
    "llama-5": FIVE_CLIENTS,
    "llama-5-best": FIVE_CLIENTS_BEST,
    "llama-8": EIGHT_CLIENTS,
    "llama-8-best": EIGHT_CLIENTS_BEST,
}
SYSTEMS: Final = ("ours", "ours-resident", "ours-twins", "engine", "peft-lora", "peft-alora", *LLAMA)
"""In the order of a round: first those for whom a conversation must be new."""
_OVER_GRPC: Final = {"ours": Served, "ours-resident": ServedResident, "ours-twins": ServedTwins}


@dataclass(slots=True)
class Bench:
    """What scenarios work with.

    Attributes:
        dtype: ``float32`` or ``bfloat16``, the same for all systems.
        device: ``cpu``, ``cuda`` or ``cuda:N``, the same for all systems.
        answers: what is compared with PEFT afterwards.
        facts: about the systems, for the JSON file.
        processes: of these facts, the settings that systems in processes of their own ran with.
        keep: told all rows so far, so that a run that is cut off was not for nothing.
    """

    console: Console
    progress: Progress
    model: Path
    dtype: str
    adapters: tuple[Adapter, ...]
    renderer: Renderer
    device: str = "cpu"
    answers: Answers = field(default_factory=Answers)
    facts: dict[str, object] = field(default_factory=dict)
    processes: dict[str, object] = field(default_factory=dict)
    keep: Callable[[Sequence[Row]], object] = lambda rows: None

    def __post_init__(self) -> None:
        self.facts["processes"] = self.processes

    @asynccontextmanager
    async def systems(self, names: Sequence[str], *, store_url: str | None = None) -> AsyncIterator[dict[str, System]]:
        """These systems, running, by name, in the order of :data:`SYSTEMS`."""
        async with AsyncExitStack() as stack:
            running: dict[str, System] = {}
            deployed = None
            if any(name in _OVER_GRPC for name in names):
                deployed = await stack.enter_async_context(self.deployed(store_url))
            for name in sorted(names, key=SYSTEMS.index):
                self.console.print(f"starting {name}", style="dim")
                system = _OVER_GRPC[name](deployed) if deployed and name in _OVER_GRPC else self.peer(name)
                running[name] = await stack.enter_async_context(system)
                self.note(name, running[name])
            yield running

    def note(self, name: str, system: System) -> None:
        """Write down what a running system's process was started with."""
        if isinstance(system, ChildSystem):
            self.processes[name] = system.facts

    def deployed(self, store_url: str | None = None) -> Deployed:
        """Our services, with these adapters and their twins."""
        root = self.adapters[0].directory.parent
        options = DeploymentOptions(
            adapter_roots=(root,),
            dtype=self.dtype,
            store_url=store_url,
            # Peers' queues have no end either, and what is refused cannot be timed.
            settings={"max_queue": "10000", "device": self.device},
        )
        return Deployed(options, self.adapters)

    def llama(self, settings: LlamaSettings) -> LlamaServer:
        """A llama-server, built and fed with converted files the first time."""
        build = ensure_llama(self.console, cuda=self.device != "cpu")
        model = ensure_model_file(build, self.model, self.dtype, self.console)
        files = ensure_adapter_files(build, self.model, self.adapters, self.console)
        flags = settings.all_flags(self.dtype, self.device)
        server = LlamaServer(build.server, model, flags, list(zip(self.adapters, files, strict=True)), settings)
        self._note_llama(build, settings, flags)
        return server

    def _note_llama(self, build: LlamaBuild, settings: LlamaSettings, flags: Sequence[str]) -> None:
        noted = self.facts.setdefault("llama_server", dict(build.facts))
        if isinstance(noted, dict):
            asked = {
                "slots": settings.slots,
                "conversations_keep_slots": settings.pin_slot,
                "base_turns_keep_the_cache": settings.base_keeps_cache,
                "flags": list(flags),
                "threads": usable_cores(),
            }
            noted.setdefault("settings", {})[settings.name] = asked

    def peer(self, name: str) -> System:
        """A system of :data:`SYSTEMS` that needs no services."""
        peers: Mapping[str, Callable[[], System]] = {
            "engine": lambda: EngineInProcess(self.model, self.dtype, self.adapters, self.device),
            "peft-lora": lambda: PeftLora(self.model, self.dtype, self.adapters, self.device),
            "peft-alora": lambda: PeftAlora(self.model, self.dtype, self.adapters, self.device),
        }
        return peers[name]() if name in peers else self.llama(LLAMA[name])


def open_bench(
    console: Console,
    progress: Progress,
    *,
    adapters: int,
    kind: Kind = "qkv",
    dtype: str | None = None,
    device: str = "cpu",
) -> Bench:
    """Model, adapters and tokenizer. The first time this takes a minute.

    Raises:
        ConfigError: there is no such device.
    """
    where = open_device(device)
    model = ensure_demo_model()
    used = dtype or native_dtype(where)
    made = ensure_adapters(model, ADAPTER_ROOT / f"{kind}-{B_STANDARD_DEVIATION[kind]:g}", count=adapters, kind=kind)
    facts: dict[str, object] = {"device": device_name(where)}
    return Bench(console, progress, model, used, made, Renderer(model), device, facts=facts)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``, as every command has them."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N, for every system")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: what the device does natively")
