"""The examples of README and API guides, run as a reader would run them, on one real deployment."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alora_serve.cli.local import DeploymentOptions, LocalDeployment
from front_door import front_door

PAGES = {
    "README.md": {"python", "bash"},
    "docs/api.md": {"python", "bash"},
    "docs/http.md": {"python", "bash"},
    "docs/intrinsics.md": {"python"},
}
"""And the languages of their examples."""
ROUTER, FRONT_DOOR = "127.0.0.1:50051", "127.0.0.1:8000"
"""Their addresses in the examples."""
COMMANDS = (".venv/bin/buf ", ".venv/bin/alora-serve generate ", ".venv/bin/alora-serve prefill ", "curl ")
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _examples(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text: a page's Python as one program, and each block of commands that call a server."""
    blocks = _BLOCK.findall(page.read_text())
    yield "python", "".join(text for language, text in blocks if language == "python")
    yield from (block for block in blocks if block[0] == "bash" and block[1].startswith(COMMANDS))


async def _run(language: str, text: str, router: str, door: str, directory: Path) -> tuple[int | None, str]:
    tools = Path(sys.executable).parent
    text = text.replace(ROUTER, router).replace(FRONT_DOOR, door).replace(".venv/bin", str(tools))
    command = (sys.executable, "-c", text) if language == "python" else ("bash", "-euo", "pipefail", "-c", text)
    environment = {**os.environ, "ALORA_ADDRESS": router}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


@pytest.mark.timeout(400)
async def test_published_examples_run(
    demo_model_directory: Path,  # which "demo" needs
    tmp_path: Path,
    pytestconfig: pytest.Config,
    subtests: pytest.Subtests,
) -> None:
    options = DeploymentOptions(
        model="demo",
        store_url=f"lmdb://{tmp_path / 'store'}",
        adapter_roots=(pytestconfig.rootpath / "examples" / "intrinsics",),
        threads=1,
        settings={"store_budget_bytes": "256MiB"},
    )
    languages: dict[str, set[str]] = {page: set() for page in PAGES}
    async with LocalDeployment(options) as deployment, front_door(deployment.router_address) as door:
        router, address = deployment.router_address, door.listening.address
        for page in PAGES:
            for language, text in _examples(pytestconfig.rootpath / page):
                languages[page].add(language)
                with subtests.test(page=page, example=text.splitlines()[0]):
                    status, output = await _run(language, text, router, address, tmp_path)
                    assert status == 0, f"{text}\n{output}"
                    assert output
    assert languages == PAGES
