"""Where an adapter's files may lie, and what its digest is of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alora_serve.adapters.files import CONFIG_NAME, PICKLED_WEIGHTS_NAME, WEIGHTS_NAME, chunks, digest_of, find_files
from alora_serve.errors import AdapterRefusedError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "certainty").mkdir(parents=True)
    (root / "certainty" / CONFIG_NAME).write_text("{}")
    (root / "certainty" / WEIGHTS_NAME).write_bytes(b"weights")
    return root


def refusal(root: Path, **limits: int) -> str:
    with pytest.raises(AdapterRefusedError) as refused:
        find_files(root / "certainty", root=root, **limits)
    return str(refused.value)


def test_files_are_found_and_read_in_chunks(root: Path) -> None:
    content = bytes(range(256)) * 10_000
    (root / "certainty" / WEIGHTS_NAME).write_bytes(content)
    files = find_files(root / "certainty", root=root)
    with files.weights.open() as file:
        assert b"".join(chunks(file)) == content
    assert files.weights.read() == content


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_refused_by_name(root: Path, name: str) -> None:
    (root / "certainty" / name).unlink()
    assert f"cannot read {name}" in refusal(root)


def test_a_bad_config_is_named_beside_missing_weights(root: Path) -> None:
    (root / "certainty" / CONFIG_NAME).write_text("{")
    (root / "certainty" / WEIGHTS_NAME).unlink()
    assert f"{CONFIG_NAME} is not JSON" in refusal(root)
    assert f"cannot read {WEIGHTS_NAME}" in refusal(root)


def test_pickled_weights_are_refused_by_name_and_never_opened(root: Path) -> None:
    (root / "certainty" / WEIGHTS_NAME).unlink()
    os.mkfifo(root / "certainty" / PICKLED_WEIGHTS_NAME)  # opening it would hang
    assert f"{PICKLED_WEIGHTS_NAME} is a pickle and is never read" in refusal(root)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_link_out_of_the_root_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (root / "certainty" / name).unlink()
    (root / "certainty" / name).symlink_to("../../secret")
    assert f"{name} leads out of the adapter root" in refusal(root)


def test_a_folder_that_is_a_link_out_of_the_root_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "certainty").rename(tmp_path / "elsewhere")
    (root / "certainty").symlink_to(tmp_path / "elsewhere")
    assert "leads out of the adapter root" in refusal(root)


def test_links_inside_the_root_are_followed_as_volume_mounts_need(root: Path) -> None:
    directory = root / "certainty"
    (directory / "..2026").mkdir()
    (directory / "..data").symlink_to("..2026")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (directory / name).rename(directory / "..2026" / name)
        (directory / name).symlink_to(f"..data/{name}")
    files = find_files(directory, root=root)
    assert files.weights.path.parent.name == "..2026"


def test_a_root_that_is_a_link_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    find_files(tmp_path / "link" / "certainty", root=tmp_path / "link")


def test_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "certainty" / CONFIG_NAME).unlink()
    (root / "certainty" / CONFIG_NAME).symlink_to(CONFIG_NAME)
    assert "cannot read adapter_config.json" in refusal(root)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_regular_file_is_refused_and_not_waited_for(root: Path, make: Callable[[Path], None]) -> None:
    (root / "certainty" / WEIGHTS_NAME).unlink()
    make(root / "certainty" / WEIGHTS_NAME)
    assert f"{WEIGHTS_NAME} is not a regular file" in refusal(root)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, "io.yaml"])
def test_what_takes_a_files_place_after_it_was_found_is_not_followed(root: Path, tmp_path: Path, name: str) -> None:
    directory = root / "certainty"
    (directory / "io.yaml").write_text("model: ~")
    files = find_files(directory, root=root)
    file = {CONFIG_NAME: files.config, WEIGHTS_NAME: files.weights, "io.yaml": files.definition}[name]
    assert file is not None
    (tmp_path / "secret").write_text("{}")
    (directory / name).unlink()
    (directory / name).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        file.read()
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(AdapterRefusedError, match="is not a regular file"):
        file.read()
    (directory / name).unlink()
    with (directory / name).open("wb") as sparse:
        sparse.truncate(file.max_bytes + 1)
    with pytest.raises(AdapterRefusedError, match="more than"):
        file.read()


def test_a_folder_that_became_a_link_after_it_was_found_is_not_followed(root: Path, tmp_path: Path) -> None:
    files = find_files(root / "certainty", root=root)
    (root / "certainty").rename(tmp_path / "elsewhere")
    (root / "certainty").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        files.config.read()


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    find_files(root / "certainty", root=root).weights.read()
    (root / "certainty" / WEIGHTS_NAME).unlink()
    (root / "certainty" / WEIGHTS_NAME).mkdir()
    refusal(root)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_large_files_are_refused_before_reading(root: Path) -> None:
    assert f"{WEIGHTS_NAME} has 7 bytes, more than 6" in refusal(root, max_weights_bytes=6)
    find_files(root / "certainty", root=root, max_weights_bytes=7)
    (root / "certainty" / CONFIG_NAME).write_text(" " * (1 << 20) + "{}")
    assert f"{CONFIG_NAME} has 1048578 bytes" in refusal(root)


def test_the_signature_changes_with_either_file(root: Path) -> None:
    files = find_files(root / "certainty", root=root)
    before = files.signature()
    assert files.signature() == before
    os.utime(files.config.path, ns=(1, 1))
    touched = files.signature()
    files.weights.path.write_bytes(b"weights!")
    assert len({before, touched, files.signature()}) == 3


def test_the_digest_is_of_meaning_and_weights_not_of_layout() -> None:
    config = {"r": 8, "target_modules": ["q_proj"]}
    weights = b"12345678"
    digest = digest_of(json.dumps(config).encode(), [weights])
    reordered = json.dumps(dict(reversed(config.items())), indent=4).encode()
    assert digest_of(reordered, [weights[:3], weights[3:]]) == digest
    assert len(digest) == 64
    changed = [
        digest_of(json.dumps(config | {"r": 4}).encode(), [weights]),
        digest_of(json.dumps(config).encode(), [b"12345679"]),
        digest_of(json.dumps(config).encode(), [weights[:7]]),
    ]
    assert len({digest, *changed}) == 4


def test_bytes_cannot_move_between_config_and_weights_unnoticed() -> None:
    # Without the length, both would hash the same bytes `1` + `11`.
    assert digest_of(b"1", [b"11"]) != digest_of(b"11", [b"1"])
