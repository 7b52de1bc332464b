"""What the machine offers: packages, ports, threads and the environment that services run best in."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Mapping
from typing import Final

from alora_serve.cores import usable_cores
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
