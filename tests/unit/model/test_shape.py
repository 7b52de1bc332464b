"""A model's files tell what the loaded model will report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPTBigCodeConfig

from alora_serve.errors import ConfigError
from alora_serve.kv.layout import KVLayout
from alora_serve.model.loader import load_base_model
from alora_serve.model.shape import kv_layout, read_model_shape
from tiny_models import FAMILIES, save_model

CONFIGS = {
    **FAMILIES,
    "gpt_bigcode": lambda: GPTBigCodeConfig(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    ),
}

_FIELDS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
PUBLISHED: dict[str, tuple[dict[str, int], float]] = {
    "SmolLM2-135M": (dict(zip(_FIELDS, (30, 9, 3, 576), strict=True)), 22.5),
    "Qwen2.5-0.5B": (dict(zip(_FIELDS, (24, 14, 2, 896), strict=True)), 12),
    "Llama-3.1-8B": (dict(zip(_FIELDS, (32, 32, 8, 4096), strict=True)), 128),
    "Granite-3-8B": (dict(zip(_FIELDS, (40, 32, 8, 4096), strict=True)), 160),
    "starcoder": ({"n_layer": 40, "n_head": 48, "n_embd": 6144, "multi_query": True}, 20),
}
"""Published configs, and the KiB that a token's KV takes in bfloat16."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_layout_is_that_of_the_loaded_model(family: str, dtype: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / family, CONFIGS[family]())
    read, loaded = read_model_shape(directory), load_base_model(directory, dtype=dtype)
    assert read.kv_layout(dtype) == loaded.layout
    assert read.parameters == sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())
    assert read.name == loaded.name


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs_take_what_is_known_of_them(name: str) -> None:
    config, kib = PUBLISHED[name]
    assert kv_layout(config, "bfloat16").bytes_per_token == kib * 1024


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 8), st.integers(1, 256))
def test_head_sizes_that_are_named_win_over_those_that_follow(layers: int, kv: int, group: int, dim: int) -> None:
    named = {"num_hidden_layers": layers, "num_attention_heads": kv * group, "num_key_value_heads": kv, "head_dim": dim}
    assert kv_layout(named, "float32") == KVLayout(layers, kv, dim, "float32")
    follows = {**named, "head_dim": None, "num_key_value_heads": None, "hidden_size": kv * group * dim}
    assert kv_layout(follows, "float32") == KVLayout(layers, kv * group, dim, "float32")


def test_parameters_come_from_the_index_where_weights_are_not_at_hand(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_shape(tmp_path).parameters is None
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16_060_522_496}, "weight_map": {}}))
    assert read_model_shape(tmp_path).parameters == 8_030_261_248
    index.write_text(json.dumps({"metadata": {"total_size": 5, "total_parameters": 7}}))
    assert read_model_shape(tmp_path).parameters == 7


def test_a_field_left_to_its_architectures_default_is_found_out_by_the_weights(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "gemma2", FAMILIES["gemma2"]())
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_key_value_heads": None}))
    with pytest.raises(ConfigError, match=r"k_proj.weight makes keys of 32 numbers, .* 4 heads of 16"):
        read_model_shape(directory)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds no config.json"),
        ({"config.json": b"{"}, "cannot read"),
        ({"config.json": b"[]"}, "holds no JSON object"),
        ({"config.json": b'{"num_hidden_layers": 2}'}, "has no num_attention_heads"),
        ({"config.json": b"{}", "a.safetensors": b"\xff" * 8}, "a.safetensors is no safetensors file"),
        ({"config.json": b"{}", "a.safetensors": b"\x02" + bytes(7) + b"[]"}, "a.safetensors is no safetensors file"),
        ({"config.json": b"{}", "a.safetensors": b""}, "a.safetensors is no safetensors file"),
    ],
)
def test_what_cannot_be_read_is_said(files: dict[str, bytes], told: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        read_model_shape(tmp_path)
