"""A kept digest is used exactly while the weight files are those that it was made of."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alora_serve.errors import ModelUnsupportedError
from alora_serve.model import digest_cache
from alora_serve.model.digest_cache import kept_weights_digest
from alora_serve.model.digests import weights_digest


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories whose weights were read, in a world where files settle at once."""
    directories: list[Path] = []

    def reading(directory: Path) -> bytes:
        directories.append(directory)
        return weights_digest(directory)

    monkeypatch.setattr(digest_cache, "weights_digest", reading)
    monkeypatch.setattr(digest_cache, "_SETTLED_NS", -1)
    return directories


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / f"{name}.safetensors").write_bytes(name.encode() * 100)
    return directory


def test_weights_are_read_once(model: Path, tmp_path: Path, read: list[Path]) -> None:
    first = kept_weights_digest(model, tmp_path / "cache")
    assert first == kept_weights_digest(model, tmp_path / "cache") == weights_digest(model)
    assert len(read) == 1
    moved = model.rename(tmp_path / "moved")
    assert kept_weights_digest(moved, tmp_path / "cache") == first
    assert len(read) == 2, "another path is another model"


def rewritten_with_its_time_set_back(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_one_that_looks_alike(file: Path) -> None:
    before, other = file.stat(), file.with_name("other")
    other.write_bytes(b"y" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize(
    "change",
    [
        rewritten_with_its_time_set_back,
        replaced_by_one_that_looks_alike,
        lambda file: file.write_bytes(b"longer" * 100),
        lambda file: file.with_name("c.safetensors").write_bytes(b"more"),
        lambda file: file.unlink(),
    ],
)
def test_any_change_of_the_files_is_seen(
    model: Path, tmp_path: Path, read: list[Path], change: Callable[[Path], object]
) -> None:
    before = kept_weights_digest(model, tmp_path)
    time.sleep(0.02)  # a tick of the file system's clock
    change(model / "b.safetensors")
    after = kept_weights_digest(model, tmp_path)
    assert after == weights_digest(model) != before
    assert len(read) == 2


@pytest.mark.parametrize("damaged", ["", "{}", "[]", '{"files": [], "digest": "00"}'])
def test_a_damaged_cache_is_none(model: Path, tmp_path: Path, read: list[Path], damaged: str) -> None:
    digest = kept_weights_digest(model, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_text(damaged)
    assert kept_weights_digest(model, tmp_path / "cache") == digest
    assert len(read) == 2
    cut = json.loads(entry.read_text())
    entry.write_text(json.dumps({**cut, "digest": cut["digest"][:-2]}))
    assert kept_weights_digest(model, tmp_path / "cache") == digest


def test_where_nothing_can_be_kept_the_digest_is_right_all_the_same(
    model: Path, tmp_path: Path, read: list[Path]
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert kept_weights_digest(model, tmp_path / "file" / "cache") == weights_digest(model)
    assert len(read) == 2


def test_files_that_changed_just_now_are_not_kept(
    model: Path, tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cache, "_SETTLED_NS", 10**12)
    for _ in range(2):
        kept_weights_digest(model, tmp_path / "cache")
    assert len(read) == 2


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupportedError, match=r"holds no \.safetensors weights"):
        kept_weights_digest(tmp_path, tmp_path)
