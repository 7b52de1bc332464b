"""Writes the folder that mellea reads intrinsics from: their io.yaml files and an index, as Granite Switch models have.

Every directory of ``--adapters`` that holds an ``io.yaml`` is one. The server goes on reading the adapters themselves::

    python examples/mellea_layout.py --adapters examples/intrinsics --output build/mellea
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from alora_serve.adapters.config import parse_adapter_config


def write_layout(adapters: Path, output: Path) -> list[str]:
    """Write the folder; what it holds of these intrinsics already is replaced. Returns their names."""
    entries = []
    for definition in sorted(adapters.glob("*/io.yaml")):
        name = definition.parent.name
        place = Path("io_configs", name, "io.yaml")
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(definition, output / place)
        config = parse_adapter_config((definition.parent / "adapter_config.json").read_bytes())
        entries.append({"adapter_name": name, "technology": config.kind, "io_config": place.as_posix()})
    if not entries:
        raise SystemExit(f"no directory of {adapters} holds an io.yaml")
    index = json.dumps({"adapters": entries}, indent=2)
    (output / "adapter_index.json").write_text(index + "\n", encoding="utf-8")
    return [entry["adapter_name"] for entry in entries]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="as of alora-serve up: a directory of adapters")
    parser.add_argument("--output", type=Path, default=Path("build/mellea"))
    arguments = parser.parse_args(argv)
    names = write_layout(arguments.adapters, arguments.output)
    print(f"{arguments.output}: {', '.join(names)}")


if __name__ == "__main__":
    main()
