"""Builds the images of deploy/docker without a Docker engine: the base by mmdebstrap, the rest by buildah.

``python scripts/build_images.py`` needs root and both programs. Images land in a storage of their own under
``build/containers``, which ``CONTAINERS_STORAGE_CONF=build/containers/storage.conf`` shows to buildah and podman. Steps
whose inputs are the same are not repeated. Where there is an engine, ``docker build`` does the same with the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_FOLDER = ROOT / "build" / "containers"

PYTHON_IMAGE = "docker.io/library/python:3.11-slim"
BASE_PACKAGES = "usr-is-merged,python3,python3-venv,ca-certificates"
UNWANTED = ("doc", "info", "locale", "man")  # below /usr/share, as in the official slim images
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

PRODUCT, STAND_INS = "deploy/docker/Dockerfile", "tests/containers/stand-ins/Dockerfile"
IMAGES = {
    "adapter-router": PRODUCT,
    "openai-front": PRODUCT,
    "base-prefill": PRODUCT,
    "adapter-decode": PRODUCT,
    "demo-model": PRODUCT,
    "store": STAND_INS,
    "prometheus": STAND_INS,
}
TAG = "local"
PIP_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")


def image(name: str) -> str:
    """The full name of one of ``IMAGES``."""
    return f"docker.io/alora-serve/{name}:{TAG}"


def configure_storage(folder: Path) -> None:
    """Show every following command the storage in ``folder``."""
    configuration = folder / "storage.conf"
    configuration.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder / "storage"}"\nrunroot = "/run/alora-serve-images"\n'
    )
    os.environ["CONTAINERS_STORAGE_CONF"] = str(configuration)


def build_base(folder: Path) -> None:
    """What ``python:3.11-slim`` is: a small Debian with Python. It trusts the certificates that this machine does."""
    if (
        subprocess.run(
            ["buildah", "inspect", "--type", "image", PYTHON_IMAGE], capture_output=True, check=False
        ).returncode
        == 0
    ):
        return
    archive = folder / "base.tar"
    if not archive.exists():
        unwanted = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNWANTED]
        hooks = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
        partial = folder / "base.partial.tar"
        include = f"--include={BASE_PACKAGES}"
        _run("mmdebstrap", "--quiet", "--variant=minbase", include, hooks, *unwanted, "bookworm", str(partial))
        partial.rename(archive)
    container = _output("buildah", "from", "scratch")
    _run("buildah", "add", "--quiet", container, str(archive), "/")
    _run("buildah", "copy", "--quiet", container, str(CERTIFICATES), str(CERTIFICATES))
    _run(
        "buildah",
        "run",
        "--isolation",
        "chroot",
        container,
        "--",
        "ln",
        "-s",
        "/usr/bin/python3",
        "/usr/local/bin/python",
    )
    _run("buildah", "config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    _run("buildah", "commit", "--quiet", "--rm", "--format", "docker", container, PYTHON_IMAGE)


def fetch_wheels(folder: Path, torch: str, torch_pip_args: str) -> Path:
    """A folder with the wheels of torch, as pip on this machine chooses them for the Python of the images."""
    wheels = folder / "wheels"
    if not any(wheels.glob(f"{torch.replace('==', '-')}[+-]*.whl")):
        shutil.rmtree(wheels, ignore_errors=True)
        chosen = ("--python-version", "3.11", "--only-binary", ":all:", torch, *shlex.split(torch_pip_args))
        _run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels), *chosen)
    return wheels


def torch_digest(wheels: Path) -> str:
    """SHA-256 of torch's wheel in the folder."""
    [wheel] = wheels.glob("torch-*.whl")
    with wheel.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def build(name: str, wheels: Path, digest: str) -> None:
    """One image, by its name in ``IMAGES``, in which no torch may come but that of the digest."""
    file = ROOT / IMAGES[name]
    ours = IMAGES[name] == PRODUCT
    context = ROOT if ours else file.parent
    # Of a name alone buildah takes the value that the environment has, if it has one.
    chosen = (f"TORCH_SHA256={digest}", *PIP_VARIABLES) if ours else ()
    arguments = [word for argument in chosen for word in ("--build-arg", argument)]
    options = ("--pull-never", "--isolation", "chroot", "--layers", "--format", "docker")
    places = ("--build-context", f"wheels={wheels}", "--file", str(file), "--target", name, "--tag", image(name))
    _run("buildah", "build", "--quiet", *options, *arguments, *places, str(context))


def sizes() -> dict[str, int]:
    """Bytes of each image, unpacked, its layers together."""
    listed = json.loads(_output("podman", "image", "inspect", *map(image, IMAGES)))
    return {name: entry["Size"] for name, entry in zip(IMAGES, listed, strict=True)}


def _run(*command: str) -> None:
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: {command[0]} failed with status {error.returncode}") from error


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Build what is not there or has changed, and tell the sizes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--torch", required=True, help="requirement of torch, such as torch==2.13.0")
    parser.add_argument("--torch-pip-args", default="", help="arguments that make pip pick a build of torch")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    configure_storage(folder)
    build_base(folder)
    wheels = fetch_wheels(folder, arguments.torch, arguments.torch_pip_args)
    digest = torch_digest(wheels)
    for name in IMAGES:
        build(name, wheels, digest)
    for name, size_bytes in sizes().items():
        print(f"{image(name):48} {size_bytes / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
