"""Our model and adapters as GGUF files, made by the scripts that llama.cpp ships for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters import Adapter
from peers.build_llama import BuildError, LlamaBuild
from rich.console import Console

_OUT_TYPES = {"bfloat16": "bf16", "float32": "f32"}


def ensure_model_file(build: LlamaBuild, model: Path, dtype: str, console: Console) -> Path:
    """The base model in the services' dtype."""
    out = build.directory / "models" / f"{model.name}-{_OUT_TYPES[dtype]}.gguf"
    if not out.exists():
        console.print(f"llama-server: converting the model to {out.name}")
        _convert(build, "convert_hf_to_gguf.py", [str(model), "--outtype", _OUT_TYPES[dtype]], out)
    return out


def ensure_adapter_files(
    build: LlamaBuild, model: Path, adapters: Sequence[Adapter], console: Console
) -> tuple[Path, ...]:
    """The aLoRAs in fp32, as their own files are, in order. Each lies beside the weights it was made from."""
    files = []
    for adapter in adapters:
        out = adapter.directory / "adapter-f32.gguf"
        if not out.exists():
            console.print(f"llama-server: converting adapter {adapter.name}")
            arguments = [str(adapter.directory), "--base", str(model), "--outtype", "f32"]
            _convert(build, "convert_lora_to_gguf.py", arguments, out)
        files.append(out)
    return tuple(files)


def _convert(build: LlamaBuild, script: str, arguments: Sequence[str], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    path = os.pathsep.join([str(build.source / "gguf-py"), str(build.converter_packages)])
    done = subprocess.run(
        [sys.executable, str(build.source / script), *arguments, "--outfile", str(part)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [""])[-1]
        raise BuildError(f"{script} failed (exit status {done.returncode}): {last}")
    part.rename(out)
