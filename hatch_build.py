"""Build hook, also run by ``make proto``: generates the typed stubs of ``proto/`` into ``shared/alora_serve/v1``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("alora_serve") / "v1"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


class StubsBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling leaves its config type open
    """Runs before every sdist, wheel and editable build, so that no artefact can ship stale stubs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the stubs; ``[tool.hatch.build] artifacts`` ships them although git ignores them."""
        generate_stubs(Path(self.root))


def generate_stubs(root: Path) -> list[Path]:
    """Write ``*_pb2.py``, ``*_pb2_grpc.py`` and their ``.pyi`` for every proto; return the files, sorted.

    A file is replaced only if its content changed, and in one rename, so whoever imports the package meanwhile never
    sees half a module. Stubs whose proto is gone are removed.

    Raises:
        RuntimeError: a protoc plugin is missing, or protoc rejected a proto (its message is on stderr).
    """
    proto_root, target = root / "proto", root / "shared" / PACKAGE
    protos = sorted((proto_root / PACKAGE).glob("*.proto"))
    if not protos:
        raise RuntimeError(f"no .proto file in {proto_root / PACKAGE}")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".stubs-") as scratch:
        _protoc(proto_root, protos, Path(scratch))
        fresh = Path(scratch) / PACKAGE
        (fresh / "__init__.py").write_text('"""Generated protobuf and gRPC stubs of the API, version 1."""\n')
        (fresh / "py.typed").touch()
        names = {path.name for path in fresh.iterdir()}
        for name in sorted(names):
            _replace_if_changed(fresh / name, target / name)
    for stale in target.glob("*_pb2*.py*"):
        if stale.name not in names:
            stale.unlink()
    return sorted(target / name for name in names)


def _protoc(proto_root: Path, protos: list[Path], output: Path) -> None:
    import grpc_tools  # here, so that the hook can be imported to list its requirements before they are installed

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto_root}", f"-I{well_known}"]
    command += [f"--plugin={name}={_find_plugin(name)}" for name in PLUGINS]
    command += [f"--{kind}_out={output}" for kind in ("python", "grpc_python")]
    command += [f"--{kind}_out=quiet:{output}" for kind in ("mypy", "mypy_grpc")]
    result = subprocess.run([*command, *map(str, protos)], check=False)
    if result.returncode:
        raise RuntimeError(f"protoc exited {result.returncode} on {', '.join(path.name for path in protos)}")


def _find_plugin(name: str) -> str:
    """Where ``name`` is: an isolated build has it on PATH only, ``.venv/bin/python`` beside the interpreter only."""
    places = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    found = shutil.which(name, path=places)
    if found is None:
        raise RuntimeError(f"{name} not found: install mypy-protobuf into the environment that builds")
    return found


def _replace_if_changed(fresh: Path, target: Path) -> None:
    if not target.exists() or target.read_bytes() != fresh.read_bytes():
        fresh.replace(target)


if __name__ == "__main__":
    for generated in generate_stubs(Path(__file__).resolve().parent):
        print(generated.name)
