"""Copies a revision of a hub repository into a folder that may hold another one: afterwards it holds this one alone.

``python -m alora_serve.model.hub_copy REPOSITORY --root DIRECTORY``: for init containers whose volume outlives them.
The hub's own download leaves what is there: the weights of a former revision would lie, and be loaded, beside the new.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import DryRunError, HfHubHTTPError

NOTE: Final = ".hub-copy.json"
"""What was asked for, in a root that holds all of it."""


def copy_revision(repository: str, revision: str, root: Path, *, folder: str, include: Sequence[str]) -> None:
    """Bring the files that match a pattern into ``root / folder``, and take all others out of ``root``.

    What lies there already is not fetched again. Old files go first: the volume need not have room for both. While the
    hub cannot be asked, what it gave for the same question before stays.

    Raises:
        HfHubHTTPError: there is no such revision.
        DryRunError: the hub cannot be asked, or refuses, and has given nothing yet.
    """
    root.mkdir(parents=True, exist_ok=True)
    target, note = root / folder, root / NOTE
    asked = json.dumps([repository, revision, folder, *include])
    patterns = [*include]
    try:
        told = snapshot_download(repository, revision=revision, local_dir=target, allow_patterns=patterns, dry_run=True)
    except DryRunError as error:
        if not note.is_file() or note.read_text() != asked:
            raise
        print(f"warning: {root} stays as it is, as the hub does not tell: {error.__cause__}", file=sys.stderr)
        return
    files = [file for file in told if not isinstance(file, str)]
    _remove_others(root, {target / file.filename for file in files}, kept=target / ".cache")
    for commit in {file.commit_hash for file in files}:  # one: what the branch names by now may be another
        snapshot_download(repository, revision=commit, local_dir=target, allow_patterns=patterns)
    note.write_text(asked)


def _remove_others(root: Path, wanted: Iterable[Path], *, kept: Path) -> None:
    """Delete the files below ``root`` that are not wanted, and folders that hold nothing; ``kept`` stays as it is."""
    stays = frozenset(wanted)
    for path in sorted(root.rglob("*"), reverse=True):  # what a folder holds comes before it
        if path.is_relative_to(kept):
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in stays:
            path.unlink()


def main() -> None:
    """Copy a revision of a hub repository into a folder, in the place of whatever lies there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("repository", metavar="REPOSITORY")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument("--root", type=Path, required=True, metavar="DIRECTORY", help="what holds nothing else")
    parser.add_argument("--folder", default="", help="where below the root its files go")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="of files; repeat for more")
    given = parser.parse_args()
    try:
        copy_revision(given.repository, given.revision, given.root, folder=given.folder, include=given.include)
    except (HfHubHTTPError, DryRunError) as error:
        sys.exit(f"error: {given.repository} at {given.revision}: {error.__cause__ or error}")


if __name__ == "__main__":
    main()
