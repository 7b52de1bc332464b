"""What a person writes for a model becomes a directory, or an error that says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from alora_serve.errors import ConfigError
from alora_serve.model import source
from alora_serve.model.source import model_name, resolve_model


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> str:
        raise AssertionError(f"{name} was asked for on the hub")

    monkeypatch.setattr(source, "snapshot_download", refuse)


def test_a_directory_with_a_config_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_model("~/model") == tmp_path / "model"


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))


def test_demo_is_the_converted_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "ensure_demo_model", lambda: tmp_path)
    assert resolve_model("demo") == tmp_path


def test_anything_else_is_asked_for_on_the_hub_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert resolve_model("org/model") == tmp_path
    [(name, patterns)] = asked
    assert name == "org/model"
    assert "*.safetensors" in patterns
    assert not {"*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*"} & set(patterns)


def test_people_call_a_model_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "granite").mkdir()
    monkeypatch.chdir(tmp_path / "granite")
    assert model_name("demo") == "SmolLM2-135M-Instruct"
    assert model_name(str(tmp_path / "granite")) == model_name(".") == "granite"
    assert model_name("org/model") == "org/model"


@pytest.mark.parametrize("path", ["/no/such/model", "~/no-such-model", "./no-such-model", "no/such/model"])
def test_a_path_to_nothing_is_called_so_and_not_a_bad_hub_id(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "snapshot_download", snapshot_download)  # refuses these before it asks anyone
    with pytest.raises(ConfigError) as caught:
        resolve_model(path)
    assert str(caught.value) == (
        f"model={path!r} is no directory here, and no hub id could be written so: check the path, or pass a "
        "hub id (organisation/name) or demo"
    )


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError("offline"), OSError("no route")], ids=str)
def test_what_the_hub_does_not_give_is_a_setting_at_fault(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(
        ConfigError, match=r"model='no/such' is no directory here, and the hub did not give it"
    ) as caught:
        resolve_model("no/such")
    assert str(failure) in str(caught.value)
