"""What may change a model's KV changes its digests, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig

from alora_serve.errors import ModelUnsupportedError
from alora_serve.model.digests import IGNORED_CONFIG_FIELDS, forward_config_digest, weights_digest
from alora_serve.model.loader import BaseModel, load_base_model
from tiny_models import FAMILIES, save_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base_model(save_model(tmp_path_factory.mktemp("llama"), FAMILIES["llama"]()), dtype="float32")


def _changed(value: Any) -> Any:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case None:
            return 7
        case [first, *rest]:
            return [_changed(first), *rest]
        case {**fields} if fields:
            key = min(fields, key=str)
            return {**fields, key: _changed(fields[key])}
        case _:
            return [1]


class _Stated:
    """A config that states just these fields, so that each can be set to anything."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def to_dict(self) -> dict[str, Any]:
        return self._fields


def _digest(fields: dict[str, Any]) -> bytes:
    return forward_config_digest(_Stated(fields))  # type: ignore[arg-type]


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {"llama": LlamaConfig, "gemma2": Gemma2Config}
CONFIG_FIELDS = [(kind, field) for kind, make in CONFIGS.items() for field in sorted(make().to_dict())]


@pytest.mark.parametrize(("kind", "field"), CONFIG_FIELDS)
def test_each_config_field_is_part_of_the_name_or_known_not_to_matter(kind: str, field: str) -> None:
    fields = CONFIGS[kind]().to_dict()
    assert _digest(fields) == forward_config_digest(CONFIGS[kind]())
    changed = _digest({**fields, field: _changed(fields[field])}) != _digest(fields)
    assert changed == (field not in IGNORED_CONFIG_FIELDS)


def test_what_decides_the_forward_pass_is_not_ignored() -> None:
    """The list may grow; these would make two models share KV that is not the same."""
    decisive = {
        "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps",
        "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier",
        "embedding_multiplier", "residual_multiplier", "logits_scaling", "sliding_window", "use_sliding_window",
        "max_window_layers", "layer_types", "hidden_act", "hidden_activation", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_hidden_layers", "hidden_size", "intermediate_size", "attention_bias",
        "mlp_bias", "tie_word_embeddings", "model_type", "num_experts_per_tok", "norm_topk_prob", "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx", "max_position_embeddings", "use_bidirectional_attention",
        "original_max_position_embeddings", "quantization_config",
    }  # fmt: skip
    assert not decisive & IGNORED_CONFIG_FIELDS


def test_unknown_fields_are_part_of_the_name_at_any_depth() -> None:
    fields = LlamaConfig().to_dict()
    assert _digest({**fields, "of_a_later_release": 1}) != _digest(fields)
    nested = {**fields, "rope_parameters": {**fields["rope_parameters"], "factor": 2.0}}
    assert _digest(nested) != _digest(fields)
    assert _digest({**fields, "list": [{"a": 1}]}) != _digest({**fields, "list": [{"a": 2}]})


def test_a_config_digest_does_not_depend_on_order_or_on_the_process() -> None:
    fields = LlamaConfig().to_dict()
    assert _digest(dict(reversed(fields.items()))) == _digest(fields)
    # A change here makes every stored block unreachable: intended only when a field's meaning changed.
    assert (
        _digest({"hidden_size": 64, "rms_norm_eps": 1e-6, "layer_types": ("full_attention",)}).hex()
        == "f3a4430133abb4b35a38b96e94c3d867e03a871ca299f26c6305b963a7b1fbb5"
    )


def test_weights_are_named_by_their_bytes_in_order_of_file_names(tmp_path: Path) -> None:
    def digest(**files: bytes) -> bytes:
        directory = tmp_path / f"w{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        for name, content in files.items():
            (directory / f"{name}.safetensors").write_bytes(content)
        return weights_digest(directory)

    first = digest(a=b"one", b=b"two")
    assert digest(b=b"two", a=b"one") == first
    assert (
        len({first, digest(a=b"onet", b=b"wo"), digest(a=b"two", b=b"one"), digest(a=b"one"), digest(a=b"onetwo")}) == 5
    )


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnsupportedError, match=r"holds no \.safetensors weights"):
        weights_digest(tmp_path)


def test_the_model_digest_covers_weights_config_and_tokenizer(llama: BaseModel) -> None:
    class _Tokenizer:
        digest = b"other"

    digests = {
        llama.model_digest,
        replace(llama, weights_digest=b"x" * 32).model_digest,
        replace(llama, forward_config_digest=b"x" * 32).model_digest,
        replace(llama, tokenizer=_Tokenizer()).model_digest,  # type: ignore[arg-type]
    }
    assert len(digests) == 4
    assert replace(llama, name="other", context_tokens=1).model_digest == llama.model_digest
