"""Base prefill, decode workers and the router as processes of this machine: what `up`, `demo` and benchmarks run."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import alora_serve
from alora_serve.cli.local import machine
from alora_serve.cli.local.events import Listening, Notice, ProcessEvent
from alora_serve.cli.local.process import ProcessSpec, RestartPolicy
from alora_serve.cli.local.readiness import wait_router_ready
from alora_serve.cli.local.spawning import Spawn, spawn_tethered
from alora_serve.cli.local.store_room import place_store
from alora_serve.cli.local.supervisor import Supervisor
from alora_serve.config import (
    SECRET_NAMES,
    AdapterSettings,
    ModelSettings,
    RouterSettings,
    SecretSettings,
    ServerSettings,
    StoreSettings,
    env_name,
    flag_name,
    load_settings,
)
from alora_serve.errors import ConfigError, UnavailableError
from alora_serve.model.demo_model import ensure_demo_model
from alora_serve.rpc.tls import ClientTls

PREFILL: Final = "prefill"
ROUTER: Final = "router"
_DRAIN_MARGIN_SECONDS: Final = 15.0
"""Beyond a service's own ``drain_seconds``: its clean-up, before it is killed."""


class LocalSettings(ModelSettings, StoreSettings, AdapterSettings, SecretSettings, RouterSettings, ServerSettings):
    """What the supervisor must know of its services' settings."""


@dataclass(frozen=True, slots=True)
class DeploymentOptions:
    """What to run. None leaves a setting to the environment (``ALORA_*``), the settings file and the default.

    Attributes:
        workers: decode workers.
        prefills: base prefills.
        host: where all services listen.
        port: the router's; 0 takes a free one. All others take free ones.
        model: directory, hub id, or ``demo``.
        store_url: see :class:`~alora_serve.config.StoreSettings`.
        adapter_roots: directories of adapters; empty also looks into the environment, then for a checkout's examples.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        threads: torch threads of each process; 0 is ``OMP_NUM_THREADS`` or, where that is unset, one a core.
        log_format: ``json`` or ``console``.
        drain_seconds: how long running requests may take when the deployment ends.
        settings: any other setting by name, for all services.
    """

    workers: int = 1
    prefills: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    model: str | None = None
    store_url: str | None = None
    adapter_roots: tuple[Path, ...] = ()
    dtype: str | None = None
    threads: int | None = None
    log_format: str = "json"
    drain_seconds: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


class LocalDeployment:
    """All services on this machine while the block runs.

    In use::

        async with LocalDeployment(DeploymentOptions(workers=2)) as deployment:
            client = AsyncClient(deployment.router_address)

    Entering returns when the router answers for a model; leaving drains router, workers and prefill in this order.
    """

    def __init__(
        self,
        options: DeploymentOptions,
        *,
        emit: Callable[[ProcessEvent], None] = lambda event: None,
        policy: RestartPolicy | None = None,
        spawn: Spawn = spawn_tethered,
    ) -> None:
        """``emit`` is told what happens, on the loop's thread; it must not block or raise.

        ``spawn`` starts the services' processes.
        """
        self.options = options
        self._emit = emit
        self._supervisor = Supervisor(emit, policy, spawn)
        self._settings: LocalSettings | None = None

    @property
    def processes(self) -> Mapping[str, Listening]:
        """Process id, address and metrics address of each process that listens now, by name."""
        running = self._supervisor.processes.items()
        return {name: process.listening for name, process in running if process.listening is not None}

    @property
    def worker_names(self) -> tuple[str, ...]:
        """Names of the decode workers."""
        return tuple(f"worker-{number}" for number in range(1, self.options.workers + 1))

    @property
    def prefill_names(self) -> tuple[str, ...]:
        """Names of the base prefills."""
        return (PREFILL, *(f"{PREFILL}-{number}" for number in range(2, self.options.prefills + 1)))

    @property
    def router_address(self) -> str:
        """``host:port`` of the public API.

        Raises:
            UnavailableError: the router does not listen now.
        """
        if ROUTER not in self.processes:
            raise UnavailableError("the router is not listening now")
        return self.processes[ROUTER].address

    @property
    def settings(self) -> LocalSettings:
        """What model, store and adapters came to, whatever they came from. Available once started."""
        if self._settings is None:
            raise UnavailableError("the deployment was not started")
        return self._settings

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self._supervisor.abort()
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Check the machine, start everything, and return when requests are answered. Takes seconds.

        Raises:
            ConfigError: a setting, the machine or a service that did not start; says what to do.
        """
        for name, count in (("workers", self.options.workers), ("prefills", self.options.prefills)):
            if count < 1:
                raise ConfigError(f"{name}={count}: at least one is needed")
        router_listen = f"{self.options.host}:{self.options.port}"
        machine.check_python()
        machine.check_model_packages()
        machine.check_port_free(router_listen)
        environment = await asyncio.to_thread(self._prepare)
        models = [self._spec(name, "base_prefill", environment) for name in self.prefill_names]
        models += [self._spec(name, "adapter_decode", environment) for name in self.worker_names]
        addresses = [started.address for started in await self._supervisor.start(models)]
        environment |= {
            "ALORA_BASE_PREFILL_ENDPOINTS": ",".join(addresses[: self.options.prefills]),
            "ALORA_DECODE_ENDPOINTS": ",".join(addresses[self.options.prefills :]),
        }
        await self._supervisor.start([self._spec(ROUTER, "adapter_router", environment, router_listen)])
        await self.wait_ready()

    async def wait_ready(self) -> None:
        """Return when every process listens and the router can send requests to each of them."""
        listening = {name: await process.wait_listening() for name, process in self._supervisor.processes.items()}
        await wait_router_ready(
            listening[ROUTER],
            num_prefills=len(self.prefill_names),
            num_workers=len(self.worker_names),
            tls=ClientTls.of_peers(self.settings),
        )

    async def kill(self, name: str) -> None:
        """SIGKILL one process and return when it is dead. It is started again, on the same addresses."""
        await self._supervisor.process(name).kill()

    async def wait_listening(self, name: str) -> Listening:
        """Where a process listens, once it does: after it was killed, that is after its restart."""
        return await self._supervisor.process(name).wait_listening()

    async def restart(self, *names: str, environment: Mapping[str, str] | None = None) -> None:
        """Replace processes by fresh ones, side by side, and return when requests are answered again.

        ``environment``: variables that differ from now on, as after an update.
        """
        processes = [self._supervisor.process(name) for name in names]
        changes = environment or {}
        await asyncio.gather(*(process.restart({**process.environment, **changes}) for process in processes))
        await self.wait_ready()

    async def stop(self) -> None:
        """Drain router, workers and prefill, in this order."""
        stages = [(ROUTER,), self.worker_names, self.prefill_names]
        drain_seconds = self._settings.drain_seconds if self._settings is not None else 0.0
        await self._supervisor.stop(stages, timeout_seconds=drain_seconds + _DRAIN_MARGIN_SECONDS)

    def abort(self) -> None:
        """End everything now; a :meth:`stop` in progress returns at once."""
        self._supervisor.abort()

    # --- preparation --------------------------------------------------------------------------------------------------

    def _prepare(self) -> dict[str, str]:
        """The environment of all services. Blocks: may convert the demo model."""
        options, settings = self.options, resolve_settings(self.options)
        if settings.model == "demo":
            ensure_demo_model()
        place = place_store(settings.store_url, settings.store_budget_bytes)
        for notice in place.notices:
            self._emit(Notice(notice))
        roots = settings.adapter_roots or example_adapter_roots()
        self._settings = settings.model_copy(update={"store_url": place.url, "adapter_roots": roots})
        chosen = {
            **options.settings,
            **_named_settings(options),
            "store_url": place.url,
            "store_budget_bytes": str(place.budget_bytes),
            "adapter_roots": ",".join(map(str, roots)),
            "log_format": options.log_format,
        }
        if not settings.handle_secrets:
            # One for this deployment's life: handles of an earlier one are refused, as after a change of secrets.
            chosen.setdefault("handle_secrets", secrets.token_urlsafe(32))
        ours = {env_name(name): value for name, value in chosen.items()}
        return machine.service_environment({**os.environ, **ours}, threads=settings.threads)

    def _spec(self, name: str, module: str, environment: Mapping[str, str], listen: str | None = None) -> ProcessSpec:
        free = f"{self.options.host}:0"
        # -P: a file in the current directory must not stand in for a module.
        command = (sys.executable, "-P", "-m", module)
        return ProcessSpec(name, command, dict(environment), listen or free, free)


def resolve_settings(options: DeploymentOptions) -> LocalSettings:
    """What options, environment, settings file and defaults come to.

    Raises:
        ConfigError: a setting that does not exist or does not fit; names it.
    """
    readable = LocalSettings.model_fields.keys() - SecretSettings.model_fields.keys() - SECRET_NAMES
    chosen = {**options.settings, **_named_settings(options)}
    argv = [f"{flag_name(name)}={value}" for name, value in chosen.items() if name in readable]
    return load_settings(LocalSettings, argv)


def _named_settings(options: DeploymentOptions) -> dict[str, str]:
    """The settings that options have fields for, where they are given."""
    named = {
        "model": options.model,
        "store_url": options.store_url,
        "dtype": options.dtype,
        "threads": options.threads,
        "drain_seconds": options.drain_seconds,
        "adapter_roots": ",".join(str(root.absolute()) for root in options.adapter_roots) or None,
    }
    return {name: str(value) for name, value in named.items() if value is not None}


def example_adapter_roots() -> tuple[Path, ...]:
    """``examples/intrinsics`` of the checkout this package is run from; empty for an installed package."""
    root = Path(alora_serve.__file__).resolve().parents[2] / "examples" / "intrinsics"
    return (root,) if root.is_dir() else ()
