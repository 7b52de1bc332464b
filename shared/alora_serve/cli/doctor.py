"""``alora-serve doctor``: looks at everything a deployment stands on, and says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal

import psutil  # type: ignore[import-untyped]  # the package has no stubs
from prometheus_client import CollectorRegistry

from alora_serve.cli.local import machine
from alora_serve.cli.local.deployment import LocalSettings, example_adapter_roots
from alora_serve.cli.local.store_room import place_store
from alora_serve.errors import AloraServeError, ConfigError
from alora_serve.kv.factory import open_store
from alora_serve.kv.store import Put, StoreKey
from alora_serve.kv.store_url import public_url
from alora_serve.metrics import CoreMetrics

State = Literal["ok", "note", "wrong"]
STORE_SECONDS: Final = 5.0
MODEL_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``detail`` says what was found and, when it is wrong, what to do."""

    subject: str
    state: State
    detail: str


def examine(settings: LocalSettings, probe: Callable[[], str]) -> Iterator[Finding]:
    """Look at one thing after another; nothing that is wrong stops the rest.

    Args:
        settings: as services would read them.
        probe: asks the deployment that the user means and says what answered.
    """
    yield _look("python", _python)
    yield _look("packages", _packages)
    yield _look("memory and cores", _machine)
    yield _look("store", lambda: _store(settings))
    yield from _model_and_adapters(settings)
    yield _look("deployment", probe)


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
    return f"{memory.available >> 20:,} of {memory.total >> 20:,} MiB free, {machine.usable_cores()} cores"


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
    )
    key, value = StoreKey(secrets.token_bytes(32)), secrets.token_bytes(1 << 16)
    found: list[bytes] = []
    try:
        store.put_many([Put(key, value, evict_first=True)], timeout_seconds=STORE_SECONDS)
        store.get_many([key], lambda _, view: found.append(bytes(view)), timeout_seconds=STORE_SECONDS)
        store.delete_many([key], timeout_seconds=STORE_SECONDS)
    except AloraServeError as error:
        raise ConfigError(
            f"{public_url(place.url)}: {error}; requests would still be answered, by computing everything anew"
        ) from error
    finally:
        store.close()
    if found != [value]:
        raise ConfigError(f"{public_url(place.url)}: a value that was just written did not come back")
    return "; ".join([f"{public_url(place.url)} keeps what is put", *place.notices])


def _model_and_adapters(settings: LocalSettings) -> Iterator[Finding]:
    roots = settings.adapter_roots or example_adapter_roots()
    try:
        report = _run_model_check(settings, ",".join(map(str, roots)))
    except ConfigError as error:
        yield Finding("model", "wrong", str(error))
        return
    detail = f"{report['model']} ({report['architecture']}), {report['dtype']}, context {report['context_tokens']}"
    yield Finding("model", "ok", detail)
    if not report["adapters"]:
        where = f"no adapters in {', '.join(map(str, roots))}" if roots else "no adapter directory: pass --adapters"
        yield Finding("adapters", "note", where)
    for adapter in report["adapters"]:
        good = f"{adapter['kind']}, rank {adapter['rank']}"
        problem = adapter["problem"]
        yield Finding(f"adapter {adapter['name']}", "wrong" if problem else "ok", problem or good)


def _run_model_check(settings: LocalSettings, roots: str) -> dict[str, Any]:
    flags = ["--model", settings.model, "--dtype", settings.dtype, "--adapter-roots", roots]
    environment = machine.service_environment(os.environ, threads=settings.threads)
    command = [sys.executable, "-P", "-m", "alora_serve.cli.model_check", *flags]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=MODEL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{settings.model} did not load within {MODEL_SECONDS:g} s") from error
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        # No report: a setting was refused, or the process crashed. Its last words are all there is.
        last = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("error: ")
        raise ConfigError(f"loading {settings.model} ended with status {done.returncode}: {last}") from error
    if "error" in report:
        raise ConfigError(report["error"])
    return report
