"""docs/ builds strictly as a site, and what a reader would not find fails the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def checkout(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """The repository, of which docs/ may be written to."""
    for entry in pytestconfig.rootpath.iterdir():
        if entry.name in {"docs", "scripts"}:  # the hooks' own place says where the repository is
            shutil.copytree(entry, tmp_path / entry.name)
        elif entry.name != "build":
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def build(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=directory,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_page_is_built_and_no_link_leads_out_of_the_site(checkout: Path) -> None:
    built = build(checkout)
    assert built.returncode == 0, built.stderr
    site = checkout / "build" / "site"
    for page in (checkout / "docs").rglob("*.md"):
        name = page.relative_to(checkout / "docs").with_suffix("")
        assert (site / name / "index.html").exists() or name.name == "index"
    for page in site.rglob("index.html"):
        for link in re.findall(r'href="([^"#]+)', page.read_text()):
            target = (page.parent / link).resolve()
            assert link.startswith("http") or (target.exists() and target.is_relative_to(site)), f"{page}: {link}"


def test_what_is_not_in_the_site_is_named_and_what_is_nowhere_fails(checkout: Path) -> None:
    (checkout / "docs" / "index.md").open("a").write(
        "\n[rules](../scripts/docs_site.py) [none](../scripts/no.py) [page](no.md) [heading](api.md#no) "
        "`[code](no.md)`\n\n```\n[code](no.md)\n```\n"
    )
    (checkout / "docs" / "unlisted.md").write_text("# Unlisted\n")
    built = build(checkout)
    assert built.returncode != 0
    assert re.findall(r"contains a link '([^']+)'", built.stderr) == ["../scripts/no.py", "no.md", "api.md#no"]
    assert "unlisted.md" in built.stderr
    index = (checkout / "build" / "site" / "index.html").read_text()
    assert "rules (<code>scripts/docs_site.py</code>)" in index
