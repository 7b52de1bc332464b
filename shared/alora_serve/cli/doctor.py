"""``alora-serve doctor``: looks at everything a deployment stands on, and says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal

import psutil  # type: ignore[import-untyped]  # the package has no stubs
from prometheus_client import CollectorRegistry
from rich.padding import Padding
from rich.text import Text

from alora_serve.cli.connection import connected
from alora_serve.cli.local import machine
from alora_serve.cli.local.deployment import (
    DeploymentOptions,
    LocalSettings,
    example_adapter_roots,
    resolve_settings,
)
from alora_serve.cli.local.store_room import place_store, shown_store
from alora_serve.cli.options import DEFAULT_ADDRESS
from alora_serve.cli.output import console, print_json
from alora_serve.client import RetryPolicy
from alora_serve.config import CACHE_DIRECTORY_VARIABLE, default_cache_directory
from alora_serve.cores import usable_cores
from alora_serve.errors import AloraServeError, ConfigError, UnavailableError
from alora_serve.kv.factory import open_store
from alora_serve.kv.redis_url import TlsFiles
from alora_serve.kv.store import Put, StoreKey
from alora_serve.metrics import CoreMetrics

State = Literal["ok", "note", "wrong"]
_STYLES: Final[Mapping[State, str]] = {"ok": "green", "note": "yellow", "wrong": "bold red"}
_STORE_SECONDS: Final = 5.0
_MODEL_SECONDS: Final = 600.0
_DEPLOYMENT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``detail`` says what was found and, when it is wrong, what to do."""

    subject: str
    state: State
    detail: str


def run(options: DeploymentOptions, address: str | None, *, as_json: bool) -> bool:
    """The command; whether nothing is wrong.

    Args:
        options: as for a deployment.
        address: of a router that must answer; without one, that the default address has none is only noted.
        as_json: print a list of findings instead of a table.

    Raises:
        ConfigError: settings that no service would start with.
    """
    findings = []
    if as_json:
        findings = list(examine(options, address))
        print_json(findings)
    else:
        out = console()
        with out.status("looking") as status:
            for finding in examine(options, address):
                findings.append(finding)
                out.print(Text.assemble((f"{finding.state:>6} ", _STYLES[finding.state]), (finding.subject, "bold")))
                out.print(Padding(Text(finding.detail), (0, 0, 0, 7)))
                status.update(f"{finding.subject} done; looking on")
        wrong = sum(finding.state == "wrong" for finding in findings)
        out.print(f"{wrong} wrong" if wrong else "nothing is wrong", style=_STYLES["wrong" if wrong else "ok"])
    return all(finding.state != "wrong" for finding in findings)


def examine(options: DeploymentOptions, address: str | None) -> Iterator[Finding]:
    """Look at one thing after another; nothing that is wrong stops the rest. Raises as :func:`run`."""
    settings = resolve_settings(options)
    yield _look("python", _python)
    yield _look("packages", _packages)
    yield _look("memory and cores", _machine)
    yield _look("cache", _cache)
    yield _look("store", lambda: _store(settings))
    yield from _model_and_adapters(settings)
    yield _deployment(address)


def _look(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, "ok", look())
    except AloraServeError as error:
        return Finding(subject, "wrong", str(error))


def _python() -> str:
    machine.check_python()
    return f"{sys.version.split()[0]} at {sys.executable}"


def _packages() -> str:
    machine.check_model_packages()
    found = []
    for name in ("alora-serve", "torch", "transformers", "peft", "grpcio"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed as a package)")
    return ", ".join(found)


def _machine() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.available >> 20:,} of {memory.total >> 20:,} MiB free, {usable_cores()} cores"


def _cache() -> str:
    directory = default_cache_directory()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{directory} cannot be written: no permission in {existing}; set {CACHE_DIRECTORY_VARIABLE} to another"
        )
    return f"{directory}, {shutil.disk_usage(existing).free >> 20:,} MiB free"


def _store(settings: LocalSettings) -> str:
    """Open the store as services would; write, read and delete one value."""
    place = place_store(settings.store_url, settings.store_budget_bytes)
    store = open_store(
        place.url,
        budget_bytes=place.budget_bytes,
        ttl_seconds=60,
        breaker_failures=1,
        breaker_reset_seconds=settings.breaker_reset_seconds,
        metrics=CoreMetrics(CollectorRegistry()),
        tls=TlsFiles.of(settings),
    )
    key, value = StoreKey(secrets.token_bytes(32)), secrets.token_bytes(1 << 16)
    found: list[bytes] = []
    try:
        store.put_many([Put(key, value, evict_first=True)], timeout_seconds=_STORE_SECONDS)
        store.get_many([key], lambda _, view: found.append(bytes(view)), timeout_seconds=_STORE_SECONDS)
        store.delete_many([key], timeout_seconds=_STORE_SECONDS)
    except AloraServeError as error:
        raise ConfigError(
            f"{shown_store(place.url)}: {error}; requests would still be answered, by computing everything anew"
        ) from error
    finally:
        store.close()
    if found != [value]:
        raise ConfigError(f"{shown_store(place.url)}: a value that was just written did not come back")
    return "; ".join([f"{shown_store(place.url)} keeps what is put", *place.notices])


def _model_and_adapters(settings: LocalSettings) -> Iterator[Finding]:
    roots = settings.adapter_roots or example_adapter_roots()
    try:
        report = _run_model_check(settings, ",".join(map(str, roots)))
    except ConfigError as error:
        yield Finding("model", "wrong", str(error))
        return
    kind = f"{report['model']} ({report['architecture']})"
    detail = f"{kind}, {report['dtype']} on {report['device']}, context {report['context_tokens']}"
    yield Finding("model", "ok", detail)
    if not report["adapters"]:
        where = f"no adapters in {', '.join(map(str, roots))}" if roots else "no adapter directory: pass --adapters"
        yield Finding("adapters", "note", where)
    for adapter in report["adapters"]:
        good = f"{adapter['kind']}, rank {adapter['rank']}"
        problem = adapter["problem"]
        yield Finding(f"adapter {adapter['name']}", "wrong" if problem else "ok", problem or good)


def _run_model_check(settings: LocalSettings, roots: str) -> dict[str, Any]:
    flags = ["--model", settings.model, "--dtype", settings.dtype, "--device", settings.device]
    environment = machine.service_environment(os.environ, threads=settings.threads)
    command = [sys.executable, "-P", "-m", "alora_serve.cli.model_check", *flags, "--adapter-roots", roots]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_MODEL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{settings.model} did not load within {_MODEL_SECONDS:g} s") from error
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        # No report: a setting was refused, or the process crashed. Its last words are all there is.
        last = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("error: ")
        raise ConfigError(f"loading {settings.model} ended with status {done.returncode}: {last}") from error
    if "error" in report:
        raise ConfigError(report["error"])
    return report


def _deployment(address: str | None) -> Finding:
    try:
        with connected(address or DEFAULT_ADDRESS, RetryPolicy(max_attempts=1)) as client:
            info = client.get_model(timeout_seconds=_DEPLOYMENT_SECONDS)
            adapters = client.list_adapters(timeout_seconds=_DEPLOYMENT_SECONDS)
    except AloraServeError as error:
        if address is None and isinstance(error, UnavailableError):
            return Finding("deployment", "note", f"none answers on {DEFAULT_ADDRESS}; alora-serve up starts one")
        return Finding("deployment", "wrong", f"{address or DEFAULT_ADDRESS}: {error}")
    refused = [adapter.name for adapter in adapters if adapter.problem]
    detail = f"{address or DEFAULT_ADDRESS} serves {info.name} in {info.dtype} with {len(adapters)} adapters"
    if refused:
        return Finding("deployment", "wrong", f"{detail}, of which it refuses {', '.join(refused)}")
    return Finding("deployment", "ok", detail)
