"""Creates or updates the virtual environment from the lock files, after checking that this machine can hold it.

Run by ``make setup`` with whatever ``python3`` the machine has, so it uses the standard library alone and must parse,
to say what is wrong, on a Python older than the project needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM_PYTHON = (3, 11)
CPU_BUILD_BYTES = 4 * 1024**3  # the CPU build of torch and the rest take 1.6 GB; pip unpacks beside it
CUDA_BUILD_BYTES = 12 * 1024**3  # several GB of wheels, which unpack to twice as much, and the rest


class SetupError(Exception):
    """What is missing, and how to get it. Printed without a traceback."""


def check_python(version: tuple[int, ...], executable: str) -> None:
    """Raise SetupError unless ``version`` can run the project."""
    if version < MINIMUM_PYTHON:
        found = ".".join(str(part) for part in version[:3])
        raise SetupError(
            f"alora-serve needs Python {MINIMUM_PYTHON[0]}.{MINIMUM_PYTHON[1]} or newer, and {executable} is {found}.\n"
            "Install a newer one and name it: make PYTHON=python3.12 demo"
        )


def check_venv_module() -> None:
    """Raise SetupError if this Python was packaged without ``venv`` or ``ensurepip``."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"{sys.executable} lacks the module {module}, which creates virtual environments.\n"
                "On Debian and Ubuntu: apt install python3-venv"
            )


def needed_bytes(system: str, machine: str, torch_pip_args: str) -> int:
    """Free disk that the environment needs on this system: pip's own choice on Linux x86-64 is torch's CUDA build."""
    takes_cuda = (system, machine) == ("Linux", "x86_64") and not torch_pip_args.strip()
    return CUDA_BUILD_BYTES if takes_cuda else CPU_BUILD_BYTES


def check_disk(directory: Path, free_bytes: int, needed: int) -> None:
    """Raise SetupError unless ``directory``, with ``free_bytes`` left of ``needed``, can take the environment."""
    if not os.access(directory, os.W_OK):
        raise SetupError(f"{directory} is not writable: the virtual environment is created in it")
    if free_bytes < needed:
        smaller = (
            f" for the CUDA build of torch. The CPU build needs {_gib(CPU_BUILD_BYTES)}: choose it with "
            'TORCH_PIP_ARGS="--index-url ...", as the README says'
        )
        raise SetupError(
            f"{directory} has {free_bytes / 1024**3:.1f} GiB free; the virtual environment needs "
            f"{_gib(needed)}{smaller if needed == CUDA_BUILD_BYTES else ''}"
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.0f} GiB"


def create(venv: Path, needed: int) -> None:
    """Create ``venv``, which will take ``needed`` bytes of disk, unless it already holds a Python with pip."""
    python = venv / "bin" / "python"
    if (
        python.exists()
        and subprocess.run([python, "-c", "import pip"], check=False, capture_output=True).returncode == 0
    ):
        return
    check_venv_module()
    check_disk(venv.parent, shutil.disk_usage(venv.parent).free, needed)
    print(f"creating {venv} with Python {sys.version.split()[0]}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)


def install(venv: Path, project: Path, torch: str, torch_pip_args: str, lock: Path) -> None:
    """Install the locked packages, torch and the project, in this order, then let pip check that they fit together.

    Torch comes without a hash, because which build is right (CPU, CUDA, ROCm) depends on the machine: the lock leaves
    it out, but holds what it needs, so it finds that there. The project's own build tools are in the lock, so its
    build needs no isolation and no network.
    """
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    print(f"installing {lock.name}", flush=True)
    subprocess.run([*pip, "install", "--quiet", "--require-hashes", "--no-deps", "-r", str(lock)], check=True)
    print(f"installing {torch}" + (f" with {torch_pip_args}" if torch_pip_args else ""), flush=True)
    script = ["sh", str(project / "scripts" / "install_torch.sh"), str(venv), str(venv / "no-wheels")]
    version = {"TORCH_VERSION": torch.partition("==")[2]}
    subprocess.run([*script, *shlex.split(torch_pip_args)], env={**os.environ, **version}, check=True)
    editable = ["--no-deps", "--no-build-isolation", "--editable", str(project)]
    subprocess.run([*pip, "install", "--quiet", *editable], check=True)
    subprocess.run([*pip, "check"], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Check, create, install; 0 on success, 1 with a message on standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--torch", required=True, help="torch and its version, such as torch==2.13.0")
    parser.add_argument("--torch-pip-args", default="", help="arguments that make pip pick a build of torch")
    options = parser.parse_args(arguments)
    project = Path(__file__).resolve().parent.parent
    try:
        check_python(tuple(sys.version_info[:3]), sys.executable)
        create(options.venv.absolute(), needed_bytes(platform.system(), platform.machine(), options.torch_pip_args))
        install(options.venv.absolute(), project, options.torch, options.torch_pip_args, options.lock.absolute())
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"setup: {shlex.join(str(part) for part in error.cmd)} exited {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
