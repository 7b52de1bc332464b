"""Writes a bill of materials (CycloneDX) of each image: Python, its packages, as cyclonedx-py finds them, and Debian's.

``python scripts/write_sbom.py IMAGE...`` needs root, buildah, and what ``scripts/fetch_tools.py images`` fetches. It
looks for images where ``scripts/build_images.py`` puts them, and writes ``build/sbom/NAME.cdx.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
CYCLONEDX = ROOT / "build" / "tools" / "images" / "bin" / "cyclonedx-py"
PREFIXES = ("venv", "usr/local")
PYTHON_VERSION = re.compile(r'^#define PY_VERSION\s+"([^"]+)"', re.MULTILINE)
DPKG_FORMAT = "${db:Status-Status} ${Package} ${Version} ${Architecture}\n"


@contextmanager
def mounted(image: str) -> Iterator[Path]:
    """The image's files."""
    container = _output("buildah", "from", "--pull-never", image)
    try:
        yield Path(_output("buildah", "mount", container))
    finally:
        _output("buildah", "rm", container)


def site_packages(files: Path) -> list[Path]:
    """Where packages of Python lie: in ``/venv``, and beside a Python that is not Debian's. That one's are dpkg's."""
    return sorted(path for prefix in PREFIXES for path in files.glob(f"{prefix}/lib/python3.*/site-packages"))


def interpreters(files: Path) -> list[dict[str, Any]]:
    """Components for a Python that is not Debian's, by what its headers say: it is not run."""
    headers = files.glob("usr/local/include/python3.*/patchlevel.h")
    found = [PYTHON_VERSION.search(header.read_text()) for header in headers]
    return [
        {
            "bom-ref": f"python:{version[1]}",
            "type": "platform",
            "name": "python",
            "version": version[1],
            "cpe": f"cpe:2.3:a:python:python:{version[1]}:*:*:*:*:*:*:*",
            "purl": f"pkg:generic/python@{version[1]}",
        }
        for version in found
        if version is not None
    ]


def python_packages(files: Path) -> dict[str, Any]:
    """A bill of what is installed in :func:`site_packages`; no interpreter of the image is run."""
    paths = [str(path) for path in site_packages(files)]
    with tempfile.TemporaryDirectory() as work:
        interpreter = Path(work) / "python"  # cyclonedx-py asks one for its path, and reads what lies there
        interpreter.write_text(f"#!/bin/sh\necho '{json.dumps([work, *paths])}'\n")
        interpreter.chmod(0o755)
        bill: dict[str, Any] = json.loads(
            _output(str(CYCLONEDX), "environment", "--output-reproducible", str(interpreter))
        )
    return bill


def debian_packages(files: Path) -> list[dict[str, Any]]:
    """Components for what dpkg has installed."""
    lines = (files / "etc" / "os-release").read_text().splitlines()
    release = dict(line.split("=", 1) for line in lines if "=" in line)["VERSION_ID"].strip('"')
    listed = _output("dpkg-query", f"--admindir={files / 'var/lib/dpkg'}", "--show", f"--showformat={DPKG_FORMAT}")
    installed = [line.split()[1:] for line in listed.splitlines() if line.startswith("installed ")]
    return [
        {
            "bom-ref": f"debian:{name}:{architecture}",
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={architecture}&distro=debian-{release}",
        }
        for name, version, architecture in installed
    ]


def bill_of(image: str, files: Path) -> dict[str, Any]:
    """The whole bill, of a container image of this name."""
    bill = python_packages(files)
    bill["metadata"]["component"] = {"bom-ref": "image", "type": "container", "name": image}
    bill["components"] = [*bill.get("components", []), *interpreters(files), *debian_packages(files)]
    return bill


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Write the bill of each image."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sbom")
    arguments = parser.parse_args()
    os.environ.setdefault("CONTAINERS_STORAGE_CONF", str(ROOT / "build" / "containers" / "storage.conf"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for image in arguments.images:
        with mounted(image) as files:
            bill = bill_of(image, files)
        target = arguments.output / f"{image.rpartition('/')[2].partition(':')[0]}.cdx.json"
        target.write_text(json.dumps(bill, indent=2) + "\n")
        print(f"{target}: {len(bill['components'])} components")


if __name__ == "__main__":
    main()
