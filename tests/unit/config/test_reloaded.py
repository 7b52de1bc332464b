"""Files are read again when they have changed, and what makes no sense changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from alora_serve.config.file_version import file_version
from alora_serve.config.reloaded import Reloaded
from alora_serve.errors import ConfigError


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("1")
    second.write_text("2")
    return first, second


@pytest.fixture
def read(files: tuple[Path, Path]) -> Callable[[], int]:
    def numbers() -> int:
        try:
            return int(files[0].read_text()) + int(files[1].read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error

    return numbers


class Clock:
    """Stands still until it is told to move."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def replace(path: Path, content: str) -> None:
    """As a mounted secret is: in one step."""
    path.with_suffix(".next").write_text(content)
    path.with_suffix(".next").replace(path)


def test_a_change_of_any_file_is_seen(files: tuple[Path, Path], read: Callable[[], int]) -> None:
    reloaded = Reloaded(files, read)
    assert reloaded.content == 3
    replace(files[0], "10")
    assert reloaded.content == 12
    replace(files[1], "20")
    assert reloaded.content == 30


def test_files_that_did_not_change_are_not_read_again(files: tuple[Path, Path]) -> None:
    reads = iter(range(10))
    reloaded = Reloaded(files, lambda: next(reads))
    assert [reloaded.content for _ in range(3)] == [0, 0, 0]


def test_what_makes_no_sense_changes_nothing_and_is_complained_about_once(
    files: tuple[Path, Path], read: Callable[[], int]
) -> None:
    reloaded = Reloaded(files, read)
    with capture_logs() as logs:
        replace(files[0], "nonsense")
        assert [reloaded.content, reloaded.content] == [3, 3]
        files[0].unlink()
        assert [reloaded.content, reloaded.content] == [3, 3]
    assert [line["log_level"] for line in logs] == ["error", "error"]
    replace(files[0], "5")
    assert reloaded.content == 7


def test_what_could_not_be_read_for_a_moment_is_tried_again_unchanged(files: tuple[Path, Path]) -> None:
    """A file whose access was mended is the same file."""
    answers: list[int | ConfigError] = [1, ConfigError("not allowed"), 2]

    def read() -> int:
        answer = answers.pop(0)
        if isinstance(answer, ConfigError):
            raise answer
        return answer

    clock = Clock()
    reloaded = Reloaded(files, read, clock=clock)
    replace(files[0], "2")
    assert reloaded.content == 1
    clock.seconds = 1.0
    assert [reloaded.content, reloaded.content] == [2, 2]


def test_what_makes_no_sense_is_tried_again_ever_more_seldom_until_it_changes(files: tuple[Path, Path]) -> None:
    tried: list[float] = []
    clock = Clock()

    def read() -> str:
        tried.append(clock.seconds)
        if files[0].read_text() == "nonsense":
            raise ConfigError("nonsense")
        return files[0].read_text()

    reloaded = Reloaded(files, read, look_seconds=1.0, clock=clock)
    tried.clear()
    replace(files[0], "nonsense")
    for second in range(1, 200):
        clock.seconds = float(second)
        assert reloaded.content == "1"
    assert tried == [1, 2, 4, 8, 16, 32, 64, 124, 184]
    replace(files[0], "other")
    clock.seconds = 200.0
    assert reloaded.content == "other", "what has changed is not waited for"
    replace(files[0], "nonsense")
    tried.clear()
    for second in range(201, 204):
        clock.seconds = float(second)
        assert reloaded.content == "other"
    assert tried == [201, 202], "it begins anew"


def test_what_a_reader_did_not_foresee_changes_nothing_and_is_not_quoted(files: tuple[Path, Path]) -> None:
    answers: list[int | Exception] = [1, OverflowError("the key itself"), OverflowError("the key itself"), 2]

    def read() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    clock = Clock()
    reloaded = Reloaded(files, read, clock=clock)
    replace(files[0], "2")
    with capture_logs() as logs:
        for seconds, content in ((0.0, 1), (1.0, 1), (3.0, 2)):
            clock.seconds = seconds
            assert reloaded.content == content
    assert [(line["log_level"], line.get("error")) for line in logs] == [("error", "OverflowError"), ("info", None)]


def test_what_makes_no_sense_at_first_stops_the_start(files: tuple[Path, Path], read: Callable[[], int]) -> None:
    files[0].write_text("nonsense")
    with pytest.raises(ConfigError):
        Reloaded(files, read)


def test_files_are_looked_at_no_more_often_than_asked(files: tuple[Path, Path], read: Callable[[], int]) -> None:
    reloaded = Reloaded(files, read, look_seconds=3600)
    replace(files[0], "10")
    assert reloaded.content == 3


def test_no_file_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every file that comes or goes there would renew certificates that nobody has."""
    monkeypatch.chdir(tmp_path)
    assert file_version("") is None
