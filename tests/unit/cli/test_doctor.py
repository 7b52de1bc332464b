"""Each thing that can be wrong is made wrong; what is right is shown by the whole deployment in tests/integration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alora_serve.cli import doctor
from alora_serve.cli.app import app
from alora_serve.cli.doctor import Finding, examine
from alora_serve.cli.local import DeploymentOptions
from alora_serve.errors import ConfigError
from tiny_models import FAMILIES, save_adapter, save_model

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_model(tmp_path_factory.mktemp("model"), FAMILIES["llama"]())


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(model, root / "good", seed=1, alora_invocation_tokens=[5, 6], target_modules=TARGETS)
    bad = save_adapter(model, root / "bad", seed=2, target_modules=TARGETS)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return root


@pytest.fixture
def findings(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """What is found, by subject, with options changed."""
    monkeypatch.setenv("ALORA_CACHE_DIR", str(tmp_path / "cache"))

    def find(address: str = "127.0.0.1:1", **changes: object) -> dict[str, Finding]:
        options = {
            "model": str(model),
            "dtype": "float32",
            "store_url": f"lmdb://{tmp_path}/kv",
            "adapter_roots": (tmp_path,),
            **changes,
        }
        return {finding.subject: finding for finding in examine(DeploymentOptions(**options), address)}

    return find


def test_a_good_machine_model_and_store_are_found_so(findings, adapters: Path) -> None:
    found = findings(adapter_roots=(adapters,))
    good = ["python", "packages", "memory and cores", "cache", "store", "model", "adapter good"]
    assert {found[subject].state for subject in good} == {"ok"}
    assert found["model"].detail.endswith("(LlamaForCausalLM), float32 on cpu, context 512")
    assert found["adapter good"].detail == "alora, rank 8"
    assert found["adapter bad"].state == "wrong"
    assert "use_dora" in found["adapter bad"].detail
    assert found["deployment"].state == "wrong"
    assert found["deployment"].detail.startswith("127.0.0.1:1: ")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads no model."""

    def no_model(settings: object, roots: str) -> dict[str, object]:
        raise ConfigError("not loaded here")

    monkeypatch.setattr(doctor, "_run_model_check", no_model)


def test_a_store_that_cannot_be_reached_is_wrong_and_says_what_it_means(findings, quick) -> None:
    store = findings(store_url="redis://user:secret@127.0.0.1:1/0")["store"]
    assert store.state == "wrong"
    assert "redis://127.0.0.1:1/0" in store.detail
    assert "secret" not in store.detail
    assert "requests would still be answered, by computing everything anew" in store.detail


def test_a_store_is_reached_as_services_reach_it(findings, quick, monkeypatch) -> None:
    monkeypatch.setenv("ALORA_STORE_TLS_CA_FILE", "/etc/tls/ca.pem")
    store = findings(store_url="redis://127.0.0.1:1/0")["store"]
    assert "store_tls_* are set" in store.detail


def test_a_store_that_loses_values_is_wrong(findings, quick, monkeypatch) -> None:
    monkeypatch.setattr("alora_serve.kv.lmdb.LmdbStore.get_many", lambda *arguments, **options: None)
    assert "a value that was just written did not come back" in findings()["store"].detail


def test_no_adapters_are_noted(findings, monkeypatch, tmp_path: Path) -> None:
    report = {"model": "m", "architecture": "a", "dtype": "d", "device": "cuda:0 (card)", "context_tokens": 1}
    report["adapters"] = []
    monkeypatch.setattr(doctor, "_run_model_check", lambda settings, roots: report)
    found = findings()
    assert (found["adapters"].state, found["adapters"].detail) == ("note", f"no adapters in {tmp_path}")
    assert found["model"].detail == "m (a), d on cuda:0 (card), context 1"


def test_a_model_that_does_not_load_is_wrong_by_its_reason(findings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = findings(model=str(tmp_path / "empty"))["model"]
    assert found.state == "wrong"
    assert "the directory holds no config.json" in found.detail


def test_a_setting_that_a_worker_would_refuse_is_wrong(findings, monkeypatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert "ended with status 1" in findings()["model"].detail


def test_a_cache_that_cannot_be_written_is_wrong(findings, quick, monkeypatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    cache = findings()["cache"]
    assert cache.state == "wrong"
    assert "set ALORA_CACHE_DIR to another" in cache.detail


def test_what_is_wrong_makes_the_exit_status(quick, tmp_path: Path) -> None:
    arguments = ["doctor", "--model", str(tmp_path), "--store", f"lmdb://{tmp_path}/kv", "--address", "127.0.0.1:1"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 1
    assert "2 wrong" in told.stdout
    asked = CliRunner().invoke(app, [*arguments, "--json"])
    assert asked.exit_code == 1
    states = {finding["subject"]: finding["state"] for finding in json.loads(asked.stdout)}
    assert (states["python"], states["model"], states["deployment"]) == ("ok", "wrong", "wrong")


def test_that_nothing_runs_is_only_noted_unless_an_address_was_given(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "DEFAULT_ADDRESS", "127.0.0.1:1")
    assert doctor._deployment(None) == Finding(
        "deployment", "note", "none answers on 127.0.0.1:1; alora-serve up starts one"
    )
    assert doctor._deployment("nonsense").state == "wrong"
