"""Adapters that do not fit, are damaged, or hold more than their config says: refused by name, listed or loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alora_serve.adapters.files import WEIGHTS_NAME, AdapterFiles, find_files
from alora_serve.adapters.loading import AdapterHost, inspect_adapter, load_adapter
from alora_serve.errors import AdapterRefusedError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def files_of(directory: Path) -> AdapterFiles:
    return find_files(directory, root=directory)


def refusal(directory: Path, base: AdapterHost) -> str:
    """The refusal's text, which listing and loading must agree on."""
    with pytest.raises(AdapterRefusedError) as inspecting:
        inspect_adapter(files_of(directory), name="certainty", base=base)
    with pytest.raises(AdapterRefusedError) as loading:
        load_adapter(files_of(directory), name="certainty", base=base)
    assert str(inspecting.value) == str(loading.value)
    return str(loading.value)


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS_NAME)
    edit(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS_NAME)


@pytest.fixture
def adapter(tmp_path: Path, save_adapter: Callable[..., Path]) -> Path:
    return save_adapter(tmp_path / "certainty", alora_invocation_tokens=[40, 41])


def test_listing_and_loading_agree(adapter: Path, llama: AdapterHost) -> None:
    info = inspect_adapter(files_of(adapter), name="certainty", base=llama)
    assert info == load_adapter(files_of(adapter), name="certainty", base=llama).info
    assert not info.resident
    assert info.problem == ""


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (f"{Q0}.lora_magnitude_vector.weight", "DoRA is not served"),
        (f"{Q0}.lora_B.bias", "a bias on B is not served"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "LoRA on embeddings is not served"),
        ("base_model.model.model.embed_tokens.weight", "trained or resized embeddings are not served"),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "no adapted module takes it"),
        (f"{Q0}.lora_A.default.weight", "no adapted module takes it"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "no adapted module takes it"),
    ],
)
def test_a_tensor_that_is_not_consumed_refuses_the_adapter(
    adapter: Path, llama: AdapterHost, extra: str, why: str
) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({extra: torch.zeros(4)}))
    assert f"tensor {extra} cannot be used: {why}" in refusal(adapter, llama)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_missing_tensor_refuses_the_adapter(adapter: Path, llama: AdapterHost, factor: str) -> None:
    # PEFT warns and goes on with a random A or a zero B: another adapter than the one trained.
    edit_tensors(adapter, lambda tensors: tensors.pop(f"{Q0}.lora_{factor}.weight"))
    assert f"tensor {Q0}.lora_{factor}.weight is missing" in refusal(adapter, llama)


def test_another_base_models_shapes_are_refused_with_both_shapes(adapter: Path, llama: AdapterHost) -> None:
    wide = {name: replace(shape, in_features=64) for name, shape in llama.module_shapes.items()}
    message = refusal(adapter, replace(llama, module_shapes=wide))
    assert f"{Q0}.lora_A.weight has shape [4, 32]" in message
    assert "need [4, 64]" in message


def test_a_rank_that_the_weights_do_not_have_is_refused(
    adapter: Path, llama: AdapterHost, edit_config: Callable[..., None]
) -> None:
    edit_config(adapter, r=8)
    assert "has shape [4, 32], but its rank and this base model need [8, 32]" in refusal(adapter, llama)


def test_an_adapter_of_another_architecture_is_refused(adapter: Path, base_of: Callable[[str], AdapterHost]) -> None:
    assert "matches no linear module of the base model" in refusal(adapter, base_of("gpt2"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(adapter: Path, llama: AdapterHost, dtype: torch.dtype) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    for read in (inspect_adapter, load_adapter):
        with pytest.raises(AdapterRefusedError, match=r"has dtype .*, not one of"):
            read(files_of(adapter), name="certainty", base=llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_at_load(adapter: Path, llama: AdapterHost, value: float) -> None:
    edit_tensors(adapter, lambda tensors: tensors[f"{Q0}.lora_B.weight"][3].fill_(value))
    with pytest.raises(AdapterRefusedError, match=rf"{Q0}.lora_B.weight holds infinities or NaNs"):
        load_adapter(files_of(adapter), name="certainty", base=llama)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: b"PK\x03\x04" + content[4:],
    ],
    ids=["empty", "cut-in-length", "cut-at-end", "too-long", "huge-header", "a-zip-in-disguise"],
)
def test_a_damaged_weights_file_is_refused(adapter: Path, llama: AdapterHost, damage: Callable[[bytes], bytes]) -> None:
    path = adapter / WEIGHTS_NAME
    path.write_bytes(damage(path.read_bytes()))
    for read in (inspect_adapter, load_adapter):
        with pytest.raises(AdapterRefusedError, match=r"^the weights file is not valid safetensors"):
            read(files_of(adapter), name="certainty", base=llama)


def test_an_invocation_outside_the_vocabulary_is_refused(
    adapter: Path, llama: AdapterHost, edit_config: Callable[..., None]
) -> None:
    edit_config(adapter, alora_invocation_tokens=[40, 64])
    assert "alora_invocation_tokens = [40, 64] leave the base model's vocabulary of 64" in refusal(adapter, llama)


def test_an_invocation_too_long_to_be_told_is_refused(
    adapter: Path, llama: AdapterHost, edit_config: Callable[..., None]
) -> None:
    edit_config(adapter, alora_invocation_tokens=[40] * 1025)
    assert refusal(adapter, llama) == "alora_invocation_tokens is 1025 tokens, more than 1024"


UNSERVED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora = true: DoRA is not served"),
    ({"bias": "lora_only"}, 'bias = "lora_only"'),
    ({"lora_bias": True}, "lora_bias = true"),
    ({"modules_to_save": ["norm"]}, 'modules_to_save = ["norm"]'),
    ({"trainable_token_indices": [3, 4]}, "trainable_token_indices = [3, 4]"),
    ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication = [[0, 2], [1, 3]]"),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa"'),
    ({"target_modules": ["embed_tokens", "q_proj"]}, "tensor base_model.model.model.embed_tokens."),
    ({"target_modules": ["lm_head", "q_proj"]}, "adapts the output layer 'lm_head'"),
]


@pytest.mark.parametrize(("fields", "named"), UNSERVED, ids=lambda value: str(value)[:40])
def test_real_adapters_of_kinds_that_are_not_served_are_refused_by_name(
    fields: dict[str, Any],
    named: str,
    tmp_path: Path,
    llama: AdapterHost,
    save_adapter: Callable[..., Path],
) -> None:
    assert named in refusal(save_adapter(tmp_path / "certainty", **fields), llama)


def test_peft_accepts_what_we_accept(
    adapter: Path, llama: AdapterHost, fresh_model: Callable[..., PreTrainedModel], recwarn: pytest.WarningsRecorder
) -> None:
    load_adapter(files_of(adapter), name="certainty", base=llama)
    peft.PeftModel.from_pretrained(fresh_model("llama"), str(adapter))
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]


def test_an_allocation_that_fails_is_a_lack_of_memory_and_another_fault_is_not(
    adapter: Path, llama: AdapterHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors.torch, "load", lambda content: torch.empty(1 << 60))
    with pytest.raises(MemoryError, match="you tried to allocate"):
        load_adapter(files_of(adapter), name="x", base=llama)
    monkeypatch.setattr(safetensors.torch, "load", lambda content: torch.ones(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        load_adapter(files_of(adapter), name="x", base=llama)


def test_ibms_old_format_turns_on_after_its_strings_first_token(
    adapter: Path, llama: AdapterHost, edit_config: Callable[..., None]
) -> None:
    edit_config(adapter, alora_invocation_tokens=None, invocation_string="<5> <6> <7>")
    loaded = load_adapter(files_of(adapter), name="x", base=llama)
    assert (loaded.lead_tokens, loaded.invocation_tokens) == ((5,), (6, 7))
    assert (loaded.info.kind, loaded.info.invocation_text) == ("alora", "<6> <7>")


@pytest.mark.parametrize(("text", "problem"), [("<5>", "is 1 token"), ("<5> <999999>", "vocabulary")])
def test_a_string_that_can_never_turn_an_adapter_on_is_refused(
    adapter: Path, llama: AdapterHost, edit_config: Callable[..., None], text: str, problem: str
) -> None:
    edit_config(adapter, alora_invocation_tokens=None, invocation_string=text)
    assert problem in refusal(adapter, llama)
    assert "invocation_string" in refusal(adapter, llama)


def test_what_defines_an_intrinsic_is_checked_with_its_adapter(adapter: Path, llama: AdapterHost) -> None:
    assert inspect_adapter(files_of(adapter), name="x", base=llama).intrinsic_digest == ""
    definition = adapter / "io.yaml"
    definition.write_text("model: ~\nresponse_format: ~\ntransformations: ~\n")
    digest = hashlib.sha256(definition.read_bytes()).hexdigest()
    assert inspect_adapter(files_of(adapter), name="x", base=llama).intrinsic_digest == digest
    assert load_adapter(files_of(adapter), name="x", base=llama).info.intrinsic_digest == digest
    definition.write_text("model: ~\nresponse_format: ~\ntransformations: ~\ncolour: red\n")
    assert "io.yaml has colour" in refusal(adapter, llama)
