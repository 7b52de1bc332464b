"""Builds the images and runs the tests of this folder on them, in namespaces that leave nothing behind.

``make containers`` runs it. It needs Linux, root, namespaces and some programs, and says aloud what is missing; that
counts as success, but for missing programs where ``ALORA_TEST_REQUIRE_ALL=1``: they can be installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "containers"

IMAGES = [
    f"docker.io/alora-serve/{target}:local"
    for target in ("adapter-router", "openai-front", "base-prefill", "adapter-decode", "demo-model")
]
PACKAGES = {
    "aardvark-dns": "aardvark-dns",
    "buildah": "buildah",
    "catatonit": "catatonit",
    "conmon": "conmon",
    "crun": "crun",
    "ip": "iproute2",
    "iptables": "iptables",
    "mmdebstrap": "mmdebstrap",
    "netavark": "netavark",
    "podman": "podman",
    "unshare": "util-linux",
}
"""Debian's packages of the programs that are needed."""
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/lib/podman", "/usr/libexec/podman"])

NAMESPACES = ("unshare", "--mount", "--cgroup", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
TRY_THEM = "mount --make-rprivate / && mount -t tmpfs t /run && mkdir /run/c && mount -t cgroup -o memory c /run/c"


def missing_programs() -> list[str]:
    """Packages to install."""
    return sorted(package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None)


def missing_rights() -> str | None:
    """What no package brings."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "root on Linux"
    tried = subprocess.run([*NAMESPACES, "sh", "-c", TRY_THEM], capture_output=True, text=True, check=False)
    return f"namespaces, and cgroups of version 1 in them ({tried.stderr.strip()})" if tried.returncode else None


def skipped(why: str) -> None:
    print(
        f"{'=' * 100}\nSKIPPED: make containers has built and tested NOTHING: it needs {why}\n{'=' * 100}", flush=True
    )


def main() -> int:
    """The exit status of the tests, or of the builds before them; arguments that are not listed are pytest's."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--missing", action="store_true", help="only list the packages that are missing, one a line")
    parser.add_argument("--torch", default="torch")
    parser.add_argument("--torch-pip-args", default="")
    arguments, of_pytest = parser.parse_known_args()
    if arguments.missing:
        print(*missing_programs(), sep="\n")
        return 0
    if programs := missing_programs():
        skipped(f"apt install {' '.join(programs)}")
        return int(os.environ.get("ALORA_TEST_REQUIRE_ALL") == "1")
    if rights := missing_rights():
        skipped(rights)
        return 0
    torch = ("--torch", arguments.torch, f"--torch-pip-args={arguments.torch_pip_args}")
    for script, *options in (("build_images.py", "--folder", FOLDER, *torch), ("write_sbom.py", *IMAGES)):
        done = subprocess.run([sys.executable, ROOT / "scripts" / script, *options], check=False)
        if done.returncode:
            return done.returncode
    pytest = (sys.executable, "-m", "pytest", "--durations=8", "tests/containers", *of_pytest)
    inside = ("/usr/bin/catatonit", "--", "bash", ROOT / "tests" / "containers" / "inside.sh", FOLDER)
    command = [*NAMESPACES, *inside, *pytest]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "ALORA_TEST_CONTAINERS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
