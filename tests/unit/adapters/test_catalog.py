"""What lies in a root costs no other adapter its place, whatever it is, and can be told to routers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from alora_serve.adapters import registry
from alora_serve.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.adapters.residency import AdapterEvent
from alora_serve.errors import AdapterNotFoundError, AdapterRefusedError
from alora_serve.rpc.convert import adapter_from_proto, adapter_to_proto
from alora_serve.types import AdapterInfo


@pytest.fixture
def root(tmp_path: Path, save_adapter: Callable[..., Path]) -> Path:
    root = tmp_path / "adapters"
    save_adapter(root / "certainty", alora_invocation_tokens=[40, 41])
    save_adapter(root / "jailbreak", seed=2)
    return root


def opened(root: Path, base: AdapterHost) -> AdapterRegistry:
    return AdapterRegistry([root], base=base, max_resident_bytes=1 << 20)


def info(adapters: AdapterRegistry, name: str) -> AdapterInfo:
    [found] = [found for found in adapters.list_adapters() if found.name == name]
    return found


def sent(listed: AdapterInfo) -> AdapterInfo:
    """As a router gets it."""
    return adapter_from_proto(adapter_to_proto(listed))


WRECKS: dict[str, dict[str, Any]] = {
    "a number beyond all floats": {"lora_alpha": 10**400},
    "a rank beyond all shapes": {"r": 10**400, "use_rslora": True},
    "a repeat beyond all counts": {"target_modules": "a{4294967295}"},
    "groups in groups": {"target_modules": "(" * 5000},
    "a layer without a number": {"layers_to_transform": [0], "layers_pattern": ["model|x"]},
    "half a character in a pattern": {"target_modules": "(?\ud800)"},
    "half a character in an invocation": {"invocation_string": "\ud800"},
}


@pytest.mark.parametrize("fields", WRECKS.values(), ids=list(WRECKS))
def test_no_config_keeps_the_other_adapters_from_being_served(
    root: Path, llama: AdapterHost, edit_config: Callable[..., None], fields: dict[str, Any]
) -> None:
    edit_config(root / "jailbreak", **fields)
    adapters = opened(root, llama)
    adapters.refresh()
    wreck = info(adapters, "jailbreak")
    assert wreck.problem
    assert "fault of ours" not in wreck.problem
    assert sent(wreck) == wreck
    with adapters.acquire("certainty") as lease:
        assert lease.adapter.info.problem == ""


def test_a_fault_over_a_file_refuses_that_adapter_and_is_logged_once(
    root: Path, llama: AdapterHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = registry.inspect_adapter

    def break_over_one(files: Any, *, name: str, base: AdapterHost) -> AdapterInfo:
        if name == "jailbreak":
            raise ZeroDivisionError("unforeseen")
        return real(files, name=name, base=base)

    monkeypatch.setattr(registry, "inspect_adapter", break_over_one)
    with capture_logs() as logs:
        adapters = opened(root, llama)
        adapters.refresh()
    assert [(line["log_level"], line["adapter"]) for line in logs] == [("error", "jailbreak")]
    problem = "reading its files ended in a fault of ours: ZeroDivisionError: unforeseen"
    assert info(adapters, "jailbreak").problem == problem
    with pytest.raises(AdapterRefusedError, match="unforeseen"):
        adapters.acquire("jailbreak")
    adapters.acquire("certainty").release()
    monkeypatch.undo()
    adapters.refresh()
    adapters.acquire("jailbreak").release()


@pytest.mark.parametrize("place", ["lost+found", "lost+found/adapter_config.json"])
def test_a_folder_that_cannot_be_looked_into_is_left_out_and_told_once(
    root: Path, llama: AdapterHost, place: str
) -> None:
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to("x" * 300)  # no name is so long, whoever looks: root may look into every folder
    with capture_logs() as logs:
        adapters = opened(root, llama)
        adapters.refresh()
    assert [(line["log_level"], line["folder"]) for line in logs] == [("warning", str(root / "lost+found"))]
    assert [listed.name for listed in adapters.list_adapters()] == ["certainty", "jailbreak"]
    adapters.acquire("certainty").release()


def test_an_adapter_that_cannot_be_looked_at_for_a_while_is_refused_and_keeps_its_place(
    root: Path, llama: AdapterHost
) -> None:
    events: list[AdapterEvent] = []
    adapters = AdapterRegistry([root], base=llama, max_resident_bytes=1 << 20, on_event=events.append)
    before = adapters.load("certainty")
    (root / "certainty").rename(root.with_name("aside"))
    (root / "certainty").symlink_to("x" * 300)
    with capture_logs() as logs:
        adapters.refresh()
    assert logs == [], "it is not left out"
    assert "File name too long" in info(adapters, "certainty").problem
    with pytest.raises(AdapterRefusedError, match="File name too long"):
        adapters.acquire("certainty")
    adapters.acquire("certainty", digest=before.digest).release()
    (root / "certainty").unlink()
    root.with_name("aside").rename(root / "certainty")
    adapters.refresh()
    assert info(adapters, "certainty") == before
    adapters.acquire("certainty").release()
    assert [event.kind for event in events] == ["load", "refuse", "hit", "hit"]


def test_one_failed_look_at_an_adapter_changes_nothing(
    root: Path, llama: AdapterHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = opened(root, llama)
    before, failures, real = adapters.load("certainty"), [OSError(errno.ESTALE, "Stale file handle")], Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        if path == root / "certainty" / CONFIG_NAME and failures:
            raise failures.pop()
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    adapters.refresh()
    assert not failures
    assert info(adapters, "certainty") == before


@pytest.mark.parametrize(("name", "quoted"), [("\ud800", "\\ud800 is not described"), ("x" * 1_000_000, "…")])
def test_a_problem_can_be_sent_whatever_it_quotes(root: Path, llama: AdapterHost, name: str, quoted: str) -> None:
    header = json.dumps({name: {}}).encode()
    (root / "certainty" / WEIGHTS_NAME).write_bytes(len(header).to_bytes(8, "little") + header)
    adapters = opened(root, llama)
    listed = info(adapters, "certainty")
    assert quoted in listed.problem
    assert len(listed.problem) < 1100
    assert sent(listed) == listed
    with pytest.raises(AdapterRefusedError) as refused:
        adapters.acquire("certainty")
    assert str(refused.value).encode().endswith(listed.problem.encode())


def test_a_folder_that_no_request_can_name_is_refused_under_a_name_that_can_be_sent(
    root: Path, llama: AdapterHost
) -> None:
    try:
        shutil.copytree(root / "certainty", root / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system takes no names but UTF-8")
    adapters = opened(root, llama)
    assert [listed.name for listed in adapters.list_adapters()] == ["caf\\udce9", "certainty", "jailbreak"]
    refused = info(adapters, "caf\\udce9")
    assert "rename it" in refused.problem
    assert sent(refused) == refused
    with pytest.raises(AdapterNotFoundError):
        adapters.acquire("caf\\udce9")
