"""Settings become a running core, or an error that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from adapter_decode.config import AdapterDecodeSettings
from alora_serve.config import load_settings
from alora_serve.engine import startup
from alora_serve.engine.core import CoreOptions, ServingCore
from alora_serve.engine.startup import CoreSettings, open_model, start_core
from alora_serve.errors import ConfigError, UnavailableError
from alora_serve.kv.keys import BlockHash
from alora_serve.metrics import CoreMetrics
from alora_serve.model.loader import BaseModel
from alora_serve.model.weights import Int8Weights, PlainWeights, best_layout
from base_prefill.config import BasePrefillSettings
from in_process import CountingMetrics, MemoryStore

SECRET = "a secret of at least 16 bytes"


def _settings(model_directory: Path, tmp_path: Path, **fields: object) -> CoreSettings:
    return CoreSettings(
        model=str(model_directory), dtype="float32", store_url=f"lmdb://{tmp_path / 'store'}",
        store_budget_bytes=1 << 24, handle_secrets=(SECRET,), **fields,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    ("threads", "variable", "set_to"), [(0, None, [2]), (0, "8", []), (3, None, [3]), (3, "8", [3])]
)
def test_threads_are_no_more_than_a_container_has_the_time_of(
    threads: int,
    variable: str | None,
    set_to: list[int],
    model_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(startup, "usable_cores", lambda: 2)
    monkeypatch.setattr(startup, "open_model", _stop)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with pytest.raises(ConfigError, match="far enough"):
        start_core(_settings(model_directory, tmp_path, threads=threads), CoreMetrics(CollectorRegistry()))
    assert seen == set_to


def _stop(_: object) -> NoReturn:
    raise ConfigError("far enough")


def test_a_core_is_what_its_settings_say(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    settings = _settings(
        model_directory,
        tmp_path,
        threads=3,
        context_tokens=200,
        block_tokens=32,
        max_batch_sequences=5,
        tenant_salt="t",
    )
    started = start_core(settings, CoreMetrics(CollectorRegistry()))
    status, info = started.core.status(), started.core.model_info()
    started.close()
    started.close()
    # Set here first; the engine's thread takes over what this one has, which is as it was.
    assert threads == [3, torch.get_num_threads()]
    assert (info.name, info.architecture, info.dtype) == ("tiny-llama", "LlamaForCausalLM", "float32")
    assert (info.context_tokens, info.vocabulary_size, info.block_tokens) == (200, 320, 32)
    assert info.kv_bytes_per_token == started.core.model.layout.bytes_per_token
    assert (status.model, status.max_running, status.running, status.queued, status.draining) == (info, 5, 0, 0, False)
    assert status.prefill_tokens_per_second > 0, "known before the first prompt"
    with pytest.raises(UnavailableError), started.core.engine.place():
        pass


def test_the_tenants_salt_changes_every_name_and_the_storage_digest(model: BaseModel) -> None:
    def core(salt: bytes, block_tokens: int = 16) -> tuple[bytes, BlockHash]:
        made = ServingCore(
            model, MemoryStore(), CoreOptions(block_tokens=block_tokens, tenant_salt=salt), CountingMetrics()
        )
        made.close()
        return made.storage_digest, made.names.chain(range(16)).name_of(16)

    for one, other in zip(core(b""), core(b"salt"), strict=True):
        assert one != other
    assert core(b"")[0] != core(b"", block_tokens=32)[0]
    assert core(b"") == core(b"")


def test_no_secret_stops_the_start_and_suggests_one(model_directory: Path, tmp_path: Path) -> None:
    settings = _settings(model_directory, tmp_path).model_copy(update={"handle_secrets": ()})
    with pytest.raises(ConfigError, match=r"handle_secrets is empty: set ALORA_HANDLE_SECRETS .* for example \S{32}$"):
        start_core(settings, CoreMetrics(CollectorRegistry()))


def test_a_model_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        start_core(_settings(tmp_path, tmp_path), CoreMetrics(CollectorRegistry()))


def test_a_device_that_is_not_there_stops_the_start_before_a_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ConfigError, match=r"device='cuda:1': torch \S+ was built without CUDA"):
        start_core(_settings(tmp_path / "none", tmp_path, device="cuda:1"), CoreMetrics(CollectorRegistry()))


def test_a_hub_model_goes_by_its_id(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "resolve_model", lambda _: model_directory)
    settings = _settings(model_directory, tmp_path).model_copy(update={"model": "org/tiny"})
    assert open_model(settings).name == "org/tiny"


@pytest.mark.parametrize("service", [BasePrefillSettings, AdapterDecodeSettings])
def test_weights_are_packed_unless_the_setting_says_no(service: type[CoreSettings], model_directory: Path) -> None:
    argv = ["--model", str(model_directory), "--dtype", "float32"]
    fastest = best_layout(torch.float32, torch.device("cpu"))
    for more, layout in (([], fastest), (["--pack-weights", "true"], fastest), (["--pack-weights", "false"], "plain")):
        model = open_model(load_settings(service, argv + more))
        assert model.weight_layout == layout
        assert {type(projection.weights) is PlainWeights for projection in model.projections} == {layout == "plain"}


def test_weights_are_rounded_only_where_the_setting_says_so(model_directory: Path) -> None:
    argv = ["--model", str(model_directory), "--dtype", "float32"]
    exact = open_model(load_settings(AdapterDecodeSettings, argv))
    rounded = open_model(load_settings(AdapterDecodeSettings, [*argv, "--weight-quantization", "int8"]))
    assert (exact.weight_quantization, rounded.weight_quantization) == ("none", "int8")
    assert not any(isinstance(projection.weights, Int8Weights) for projection in exact.projections)
    assert all(isinstance(projection.weights, Int8Weights) for projection in rounded.projections)


def test_a_template_that_prints_the_date_is_warned_of(
    model: BaseModel, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.tokenizer), "prints_date", True)
    with capture_logs() as logs:
        open_model(_settings(model_directory, tmp_path))
    assert any("prints the date" in line["event"] for line in logs)


def test_a_template_whose_generation_prompt_changes_the_turns_is_warned_of(
    model: BaseModel, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with capture_logs() as quiet:
        open_model(_settings(model_directory, tmp_path))
    monkeypatch.setattr(type(model.tokenizer), "is_prefix_stable", False)
    with capture_logs() as logs:
        open_model(_settings(model_directory, tmp_path))
    assert not any("generation prompt" in line["event"] for line in quiet)
    assert any("generation prompt changes the turns" in line["event"] for line in logs)
