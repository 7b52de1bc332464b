"""``alora-serve up``: every service on this machine until Ctrl-C, with their logs merged."""

from __future__ import annotations

import asyncio
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.status import Status
from rich.text import Text

from alora_serve.cli.local.deployment import DeploymentOptions, LocalDeployment, resolve_settings
from alora_serve.cli.local.events import Exited, Listening, LogLine, Notice, ProcessEvent, Spawned, StartError
from alora_serve.cli.local.store_room import shown_store
from alora_serve.cli.output import console, print_json
from alora_serve.errors import ConfigError
from alora_serve.kv.factory import lmdb_root
from alora_serve.model.demo_model import ensure_demo_model

_STYLES: Final = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class View(Protocol):
    """Shows what happens. Called on the event loop's thread."""

    def event(self, event: ProcessEvent) -> None:
        """Something happened to a process."""

    def ready(self, deployment: LocalDeployment) -> None:
        """Requests are answered."""

    def draining(self) -> None:
        """The end begins; running requests may finish."""


async def serve_until_told(options: DeploymentOptions, view: View) -> None:
    """Run everything until SIGINT, SIGTERM or SIGHUP, then drain. A second signal ends everything at once.

    Raises:
        ConfigError: it could not start; says why.
    """
    deployment = LocalDeployment(options, emit=view.event)
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            deployment.abort()
        stop.set()

    with _signals_handled(on_signal):
        starting = asyncio.create_task(deployment.start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                view.ready(deployment)
                await stopping
                view.draining()
            else:
                starting.cancel()
                deployment.abort()
        except BaseException:
            deployment.abort()
            raise
        finally:
            stopping.cancel()
            await deployment.stop()


@contextmanager
def _signals_handled(handler: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


class JsonView:
    """One JSON object a line for machines; what the processes log as JSON is passed on as such."""

    def event(self, event: ProcessEvent) -> None:
        """See :class:`View`."""
        match event:
            case Spawned():
                print_json({"event": "spawned", "process": event.name, "pid": event.pid})
            case Listening():
                print_json({"event": "listening", "process": event.name, **_addresses(event)})
            case LogLine():
                print_json({"event": "log", "process": event.name, "line": event.line})
            case Exited():
                print_json(
                    {
                        "event": "exited",
                        "process": event.name,
                        "pid": event.pid,
                        "status": event.status,
                        "expected": event.expected,
                        "restart_in_seconds": event.restart_in_seconds,
                    }
                )
            case Notice():
                print_json({"event": "notice", "message": event.message})

    def ready(self, deployment: LocalDeployment) -> None:
        """See :class:`View`."""
        processes = {name: _addresses(listening) for name, listening in deployment.processes.items()}
        store = shown_store(deployment.settings.store_url)
        address = deployment.router_address
        print_json({"event": "ready", "router_address": address, "store": store, "processes": processes})

    def draining(self) -> None:
        """See :class:`View`."""
        print_json({"event": "draining"})


class TextView:
    """Lines for people: each log line behind its process's name, in a colour of its own."""

    def __init__(self, console: Console, num_workers: int, status: Status) -> None:
        """``status`` turns while something is awaited; it shows on terminals only."""
        self._console = console
        self._status = status
        self._width = len(f"worker-{num_workers}")
        self._styles: dict[str, str] = {}
        self._starting: dict[str, None] = {}  # in order

    def event(self, event: ProcessEvent) -> None:
        """See :class:`View`."""
        match event:
            case Spawned():
                self._starting[event.name] = None
                self._show_status()
            case Listening():
                self._starting.pop(event.name, None)
                self._show_status()
            case LogLine():
                self._line(event.name, event.line)
            case Exited():
                self._starting.pop(event.name, None)
                if not event.expected:
                    seconds = event.restart_in_seconds
                    again = "" if seconds is None else f", starting again in {seconds:g} s"
                    self._line(event.name, f"died: {_ending(event.status)}{again}", "bold red")
            case Notice():
                self._line("up", event.message, "yellow")

    def ready(self, deployment: LocalDeployment) -> None:
        """See :class:`View`."""
        address = deployment.router_address
        settings = deployment.settings
        roots = ", ".join(map(str, settings.adapter_roots)) or "none: pass --adapters DIRECTORY"
        self._line("up", f"ready: gRPC API of alora_serve.v1.AloraService on {address}", "bold green")
        self._line("up", f"model {settings.model}, adapters {roots}")
        self._line("up", f"store: {shown_store(settings.store_url)}{_how_to_empty(settings.store_url)}")
        for name, listening in deployment.processes.items():
            self._line("up", f"metrics of {name}: http://{listening.metrics_address}/metrics", "dim")
        self._line("up", f'try: alora-serve generate --address {address} --message "What is the capital of France?"')
        self._line("up", "Ctrl-C drains and ends; a second Ctrl-C ends at once", "dim")

    def draining(self) -> None:
        """See :class:`View`."""
        self._line("up", "draining: running requests may finish", "yellow")
        self._status.update("draining")
        self._status.start()

    def _show_status(self) -> None:
        if self._starting:
            self._status.update(f"starting {', '.join(self._starting)}")
            self._status.start()
        else:
            self._status.stop()

    def _line(self, name: str, line: str, style: str = "") -> None:
        colour = self._styles.setdefault(name, _STYLES[len(self._styles) % len(_STYLES)])
        self._console.print(Text.assemble((f"{name:<{self._width}} | ", colour), (line, style)), soft_wrap=True)


def _addresses(listening: Listening) -> dict[str, object]:
    return {"pid": listening.pid, "address": listening.address, "metrics_address": listening.metrics_address}


def _how_to_empty(store_url: str) -> str:
    """What outlives the deployment, and how to be rid of it."""
    if not store_url.startswith("lmdb:"):
        return ""
    return f", kept for the next start; to free it once this has ended: rm -r {shlex.quote(str(lmdb_root(store_url)))}"


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"killed by {signal.Signals(-status).name}"


def run(options: DeploymentOptions, *, as_json: bool) -> None:
    """The command. The demo model is converted, with a progress bar, before anything else starts.

    Raises:
        ConfigError: it could not start; says why, or as text that the log does, which is shown.
    """
    if as_json:
        asyncio.run(serve_until_told(options, JsonView()))
        return
    out = console()
    if resolve_settings(options).model == "demo":
        ensure_demo_model(console=out)
    with out.status("starting") as status:
        try:
            asyncio.run(serve_until_told(options, TextView(out, options.workers, status)))
        except StartError as error:
            raise ConfigError(f"{error.summary}: see the last lines of its log") from error
