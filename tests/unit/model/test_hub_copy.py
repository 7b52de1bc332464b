"""A folder holds the revision of a hub's repository that was asked for last, and nothing of one before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub, fake_hub, fetched

WHOLE = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.model": b"tokens", "model.bin": b"a pickle"}
RESHARDED = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"other wei",
    "model-00002-of-00002.safetensors": b"ghts",
    "model.safetensors.index.json": b"{}",
    "tokenizer.model": b"tokens",
}
"""A later revision of the model."""
INCLUDE = [f"--include=*.{ending}" for ending in ("json", "safetensors", "model")]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub(main=WHOLE) as hub:
        yield hub


def copy(hub: FakeHub, root: Path, *arguments: str, repository: str = "a/b") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alora_serve.model.hub_copy", repository, f"--root={root}", *INCLUDE, *arguments]
    environment = hub.environment(root.parent / "home")
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def copied(hub: FakeHub, root: Path, *arguments: str, repository: str = "a/b") -> dict[str, bytes]:
    done = copy(hub, root, *arguments, repository=repository)
    assert done.returncode == 0, done.stderr
    return fetched(root)


@pytest.mark.parametrize("how", ["another revision", "another repository", "the branch moved"])
def test_another_revision_takes_the_place_of_the_former_one(how: str, hub: FakeHub, tmp_path: Path) -> None:
    """Weights under an old name would be read, and hashed, with the new ones."""
    root = tmp_path / "model"
    assert copied(hub, root) == {name: text for name, text in WHOLE.items() if not name.endswith(".bin")}
    hub.sent.clear()
    branch = "next" if how == "another revision" else "main"
    hub.revisions = {branch: RESHARDED}
    repository = "a/c" if how == "another repository" else "a/b"
    assert copied(hub, root, f"--revision={branch}", repository=repository) == RESHARDED
    assert sorted(hub.sent) == sorted(RESHARDED.keys() - WHOLE.keys()), "what is the same is not fetched again"


def test_what_moves_to_another_folder_is_not_in_the_old_one(hub: FakeHub, tmp_path: Path) -> None:
    """A folder that was left would be an adapter still."""
    root = tmp_path / "adapters"
    for folder in ("certainty", "uncertainty"):
        assert {name.partition("/")[0] for name in copied(hub, root, f"--folder={folder}")} == {folder}
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["uncertainty"]


def test_while_the_hub_is_away_a_folder_stays_as_it_is_and_is_taken_for_nothing_else(
    hub: FakeHub, tmp_path: Path
) -> None:
    root = tmp_path / "model"
    before = copied(hub, root)
    hub.revisions = {}
    assert copied(hub, root) == before
    other = copy(hub, root, repository="a/c")
    assert other.returncode == 1
    assert "error: a/c at main: " in other.stderr


def test_a_copy_that_was_cut_short_is_not_taken_for_whole(hub: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "model"
    copied(hub, root)
    hub.revisions, hub.withheld = {"main": RESHARDED}, {"model-00002-of-00002.safetensors"}
    assert copy(hub, root).returncode == 1
    hub.revisions = {}
    assert copy(hub, root).returncode == 1, "neither revision is there"
    hub.revisions, hub.withheld = {"main": RESHARDED}, set()
    assert copied(hub, root) == RESHARDED


def test_a_hub_that_refuses_is_told_in_a_line(hub: FakeHub, tmp_path: Path) -> None:
    done = copy(hub, tmp_path / "model", "--revision=gone")
    assert done.returncode == 1
    assert "error: a/b at gone: " in done.stderr
    assert "Traceback" not in done.stderr
