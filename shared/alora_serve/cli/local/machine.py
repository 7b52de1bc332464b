"""What the machine offers: packages, ports, threads and the environment that services run best in."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Final

from alora_serve.errors import ConfigError

MINIMUM_PYTHON: Final = (3, 11)
MODEL_PACKAGES: Final = ("torch", "transformers", "peft", "safetensors", "tokenizers", "gguf")
"""Of the extra ``[model]``: what base prefill, decode workers and training import."""


def check_python() -> None:
    """Raise ConfigError on a Python that is too old."""
    if sys.version_info < MINIMUM_PYTHON:
        raise ConfigError(f"Python {sys.version.split()[0]} is too old: alora-serve needs 3.11 or newer")


def check_model_packages() -> None:
    """Raise ConfigError, with the command to run, when packages of the extra ``[model]`` are missing."""
    missing = [name for name in MODEL_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"not installed: {', '.join(missing)}. Training, base prefill and decode workers need them: "
            "pip install 'alora-serve[model]'"
        )


def check_port_free(address: str) -> None:
    """Raise ConfigError when ``host:port`` cannot be bound now. Port 0 always can."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror}; stop what has the port, choose another with --port, "
                "or let --port 0 take a free one"
            ) from error


def usable_cores(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: those that it may run on, or fewer where its time is limited to less (``--cpus``).

    Args:
        membership: which control groups it is in, on Linux.
        root: where they are.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    limits = (cores_of(quota) for quota in _quotas(_text(membership), root))
    return min([len(os.sched_getaffinity(0)), *(ceil(limit) for limit in limits if limit is not None)])


def cores_of(quota: str) -> float | None:
    """What ``cpu.max`` comes to, or ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``: time in each period, both in us.

    None where there is no limit: ``max``, or below 0.
    """
    allowed, period = quota.split()
    return None if allowed == "max" or int(allowed) < 0 else int(allowed) / int(period)


def _quotas(membership: str, root: Path) -> Iterator[str]:
    """The quotas of these control groups and all above them. In a container, those above its own are not to be seen."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        files: tuple[str, ...]
        if not controllers:
            bases, files = (root, root / "unified"), ("cpu.max",)
        elif "cpu" in controllers.split(","):
            bases, files = (root / "cpu", root / controllers), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        parts = path.strip("/").split("/")
        for group in (base.joinpath(*parts[:count]) for base in bases for count in range(len(parts) + 1)):
            texts = [_text(group / file) for file in files]
            if all(texts):
                yield " ".join(texts)


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def service_environment(base: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """``base`` and, where it is silent, what makes torch and the allocator behave beside other processes.

    Args:
        base: the user's own environment, whose values win.
        threads: of torch in each process, whatever ``base`` says; 0 is what ``base`` says or, unset, one a core.
    """
    defaults = {
        # Prefill and decode take turns more than they overlap, so each may use every core ...
        "OMP_NUM_THREADS": str(usable_cores()),
        # ... as long as a thread that waits sleeps: two spinning pools make a 1 ms product take 15.
        "OMP_WAIT_POLICY": "passive",
        # glibc returns large buffers to the system and faults them in again, at 1.5 GB/s, unless told to keep them.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        # One conversation is tokenized at a time; the pool of the tokenizers would only warn about forks.
        "TOKENIZERS_PARALLELISM": "false",
        # Progress bars are for terminals; here they would be log lines.
        "TQDM_DISABLE": "1",
        # Log lines as they are written.
        "PYTHONUNBUFFERED": "1",
    }
    # torch has as many threads as the smaller of the two says.
    chosen = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) if threads else {}
    return {**defaults, **base, **chosen}
