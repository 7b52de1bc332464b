"""MkDocs' hooks: docs/ becomes a site of which no link leads out, in the order of docs/index.md.

Pages of the repository that docs/ links are put beside it, under ``repository/``. Links between the two are written for
a checkout; here they are turned to where their page is in the site. What is in the repository and not in the site, a
folder or a source file, is named instead of linked. A link to nothing stays as it is, for MkDocs to refuse.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
BESIDE_DOCS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "examples/README.md",
    "examples/data/README.md",
    "deploy/helm/alora-serve/README.md",
    "proto/alora_serve/v1/alora.proto",
)
FOLDER = "repository"

_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
_CODE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.MULTILINE | re.DOTALL)
_INDEX_ROW = re.compile(r"^\| (?:(\d+) \| )?\[([^\]]+)\]\(([\w/.-]+\.md)\)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of pages: the tables of docs/index.md, then what lies beside docs/."""
    rows = _INDEX_ROW.findall((ROOT / "docs" / "index.md").read_text())
    guide: list[Any] = [{title[0].upper() + title[1:]: page} for number, title, page in rows if not number]
    decisions = [{f"{number}. {title}": page} for number, title, page in rows if number]
    beside = [{path.removesuffix("/README.md"): f"{FOLDER}/{path}"} for path in BESIDE_DOCS if path.endswith(".md")]
    config.nav = [{"Documentation": "index.md"}, *guide, {"Decisions": decisions}, {"Repository": beside}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies beside docs/."""
    for path in BESIDE_DOCS:
        files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the page's links."""
    here = _in_repository(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        label, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return link[0]
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        in_site = _in_site(meant)
        if in_site is not None and files.get_file_from_path(in_site) is not None:
            written = os.path.relpath(in_site, posixpath.dirname(page.file.src_uri) or ".")
            return f"{label}({written}{hash_sign}{anchor})"
        return f"{label[1:-1]} (`{meant}`)" if (ROOT / meant).exists() else link[0]

    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(turned, part) for index, part in enumerate(parts))


def _in_repository(src_uri: str) -> str:
    return src_uri.removeprefix(f"{FOLDER}/") if src_uri.startswith(f"{FOLDER}/") else f"docs/{src_uri}"


def _in_site(path: str) -> str | None:
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" if path in BESIDE_DOCS else None
