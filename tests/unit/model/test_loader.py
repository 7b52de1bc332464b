"""A model is served exactly or refused by name, and its digests change with whatever may change its KV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alora_serve.errors import ModelUnsupportedError
from alora_serve.kv.layout import KVLayout
from alora_serve.model import loader
from alora_serve.model.device import CPU, native_dtype
from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.model.runner import ModelRunner
from alora_serve.model.step import Span
from tiny_models import FAMILIES, VOCABULARY, load_reference, save_model, save_tokenizer

torch.set_num_threads(1)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MULTI_HEAD = {**_SIZES, "num_key_value_heads": 4}
_MOE = {**_SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0}

SERVED: dict[str, dict[str, Any]] = {
    "mistral": {**_SIZES, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**_SIZES, "head_dim": 16, "sliding_window": 8},
    "mixtral": {**_MOE, "sliding_window": None},
    "granitemoe": _MOE,
    "olmo2": _SIZES,
    "cohere": _SIZES,
    "gpt_neox": _MULTI_HEAD,
    "opt": {**_MULTI_HEAD, "ffn_dim": 64, "word_embed_proj_dim": 64},
    "gptj": {**_GPT, "rotary_dim": 8, "eos_token_id": 0},
    "gpt_bigcode": {**_GPT, "eos_token_id": 0},
}
"""Families beyond those of the parity suite."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({**_SIZES, "hidden_size": 32, "state_size": 4}, "layer type 'linear_attention' of mamba is not served"),
    "lfm2": ({**_SIZES, "full_attn_idxs": [1]}, "layer type 'conv' of lfm2"),
    "llama4_text": (
        {**_MOE, "intermediate_size_mlp": 96, "head_dim": 16, "attention_chunk_size": 16},
        "layer type 'chunked_attention' of llama4_text",
    ),
    "falcon": (_SIZES, "FalconForCausalLM sent 0 of 2 layers through the attention interface"),
    "bloom": ({**_SIZES, "n_layer": 2, "n_head": 4}, "BloomForCausalLM sent 0 of 2 layers"),
    "t5": (
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        "t5 is an encoder-decoder model",
    ),
    "gpt_oss": ({**_MOE, "head_dim": 16, "sliding_window": 16}, "GptOssAttention passes s_aux to attention"),
    "deepseek_v3": (
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 24,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
        },
        r"DeepseekV3Attention has keys \(1, 4, 2, 16\) and values \(1, 4, 2, 24\)",
    ),
    "rwkv": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
        "the config of rwkv has no num_attention_heads",
    ),
    "gemma3_text": (
        {**_SIZES, "head_dim": 16, "use_bidirectional_attention": True},
        "Gemma3Attention passes is_causal=False to attention",
    ),
}


def _save(kind: str, fields: dict[str, Any], directory: Path) -> Path:
    config = AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    maker.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def _tokens(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(3)).tolist())


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", FAMILIES["llama"]())


@pytest.fixture(scope="module")
def llama(llama_directory: Path) -> BaseModel:
    return load_base_model(llama_directory, dtype="float32")


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_be_served_exactly_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    fields, message = REFUSED[kind]
    with pytest.raises(ModelUnsupportedError, match=message):
        load_base_model(_save(kind, fields, tmp_path), dtype="float32")


@pytest.mark.parametrize("kind", sorted(SERVED))
def test_a_prompt_in_two_pieces_gives_the_logits_of_the_stock_model(kind: str, tmp_path: Path) -> None:
    model = load_base_model(
        save_model(tmp_path, AutoConfig.for_model(kind, **SERVED[kind]), sharpness=3.0), dtype="float32"
    )
    tokens = _tokens(30)
    with torch.no_grad():
        expected = load_reference(tmp_path)(torch.tensor([tokens])).logits[0, -1]
    first = KVSlice(KVSegment.allocate(model.layout, 13, 0, model.device), 0, 13)
    rest = KVSlice(KVSegment.allocate(model.layout, 17, 13, model.device), 0, 17)
    runner = ModelRunner(model)
    assert runner.forward([Span(tokens[:13], 0, (), first)], [False]) is None
    logits = runner.forward([Span(tokens[13:], 13, (first,), rest)], [True])
    assert logits is not None
    assert (logits[0] - expected).abs().max() < 1e-4


def test_the_stock_model_is_unchanged_but_for_attention_and_products(llama: BaseModel, llama_directory: Path) -> None:
    assert not llama.module.training
    assert not any(parameter.requires_grad for parameter in llama.module.parameters())
    stock = load_reference(llama_directory).state_dict()
    kept = {name: value for name, value in llama.module.state_dict().items() if not value.is_meta}
    assert kept.keys() == {name for name in stock if "norm" in name or "embed" in name}
    assert all(torch.equal(stock[name], value) for name, value in kept.items())
    for projection in llama.projections:
        weights = torch.cat([stock[f"{name}.weight"] for name in projection.names])
        assert torch.allclose(projection(torch.eye(projection.in_features)).t(), weights, atol=1e-6)


def test_facts_of_the_model_are_those_of_its_config(llama: BaseModel) -> None:
    assert llama.name == "tiny-llama"
    assert llama.layout == KVLayout(layers=4, kv_heads=2, head_dim=16, dtype="float32")
    assert (llama.context_tokens, llama.vocabulary_size, llama.dtype) == (512, VOCABULARY, "float32")
    assert sum(len(projection.names) for projection in llama.projections) == 4 * 7 + 1


def test_the_context_can_be_lowered_but_not_raised(llama_directory: Path) -> None:
    assert load_base_model(llama_directory, dtype="float32", context_tokens=100).context_tokens == 100
    assert load_base_model(llama_directory, dtype="float32", context_tokens=10_000).context_tokens == 512


def test_a_model_can_have_another_name_than_its_directory(llama_directory: Path) -> None:
    assert load_base_model(llama_directory, dtype="float32", name="org/model").name == "org/model"


def test_the_dtype_is_what_the_processor_does_natively_unless_given(
    llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for capabilities, expected in (
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert native_dtype(CPU) == expected
    monkeypatch.setattr(loader, "native_dtype", lambda _: "bfloat16")
    automatic = load_base_model(llama_directory, dtype="auto")
    assert (automatic.dtype, automatic.layout.dtype, automatic.module.dtype) == ("bfloat16", "bfloat16", torch.bfloat16)


def test_end_of_sequence_is_what_config_and_generation_config_say(llama_directory: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **{**_SIZES, "eos_token_id": [3, 4]})
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 5
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert load_base_model(tmp_path, dtype="float32").tokenizer.end_of_sequence_ids >= {3, 4, 5}


def test_two_models_in_one_process_do_not_share_attention(llama: BaseModel, llama_directory: Path) -> None:
    other = load_base_model(llama_directory, dtype="float32")
    assert other.attention is not llama.attention
    assert other.module.config._attn_implementation != llama.module.config._attn_implementation


def test_a_model_that_keeps_its_own_attention_leaves_that_of_others_alone(tmp_path: Path) -> None:
    """It still names "eager" in its config; registering ours under that name would turn it on for every model."""
    fields, message = REFUSED["falcon"]
    before = {
        name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "alora" not in name
    }
    with pytest.raises(ModelUnsupportedError, match=message):
        load_base_model(_save("falcon", fields, tmp_path), dtype="float32")
    after = {
        name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "alora" not in name
    }
    assert after == before


# --- windows ----------------------------------------------------------------------------------------------------------


def _windows(config: PreTrainedConfig, seen: dict[int, int | None]) -> None:
    loader._check_windows(config, seen)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_windows_that_reach_attention_are_accepted(family: str, tmp_path: Path) -> None:
    load_base_model(save_model(tmp_path, FAMILIES[family]()), dtype="float32")


def test_a_window_that_a_layer_does_not_pass_on_is_refused() -> None:
    """It would be applied through a mask only, and our attention takes none: the layer would see too much."""
    config = FAMILIES["gemma2"]()
    good = {layer: 24 if kind == "sliding_attention" else None for layer, kind in enumerate(config.layer_types)}
    _windows(config, good)
    for layer, window in good.items():
        bad = {**good, layer: None if window else 24}
        with pytest.raises(ModelUnsupportedError, match=f"layer {layer} of gemma2 has window {window} in its config"):
            _windows(config, bad)


def test_a_window_that_is_switched_off_is_none() -> None:
    config = AutoConfig.for_model("qwen2", **_SIZES, use_sliding_window=False, sliding_window=8)
    _windows(config, {0: None, 1: None})


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def _dynamic(**fields: object) -> PreTrainedConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return AutoConfig.for_model("llama", **{**_SIZES, "rope_parameters": rope, **fields})


def test_the_context_ends_where_rotary_frequencies_begin_to_depend_on_it() -> None:
    assert loader._context_limit(AutoConfig.for_model("llama", **_SIZES)) == 128
    assert loader._context_limit(_dynamic()) == 128
    assert loader._context_limit(_dynamic(original_max_position_embeddings=32)) == 32
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = AutoConfig.for_model("phi3", **_SIZES, rope_parameters=rope, original_max_position_embeddings=64)
    assert loader._context_limit(longrope) == 64


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_a_model_whose_config_names_no_context_needs_one_in_the_settings(kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY)
    with pytest.raises(ModelUnsupportedError, match=rf"{kind} has no max_position_embeddings; .*ALORA_CONTEXT_TOKENS"):
        loader._context_limit(config)
    assert loader._context_limit(config, 77) == 77


def test_rotary_embeddings_of_each_layer_type_are_looked_at() -> None:
    config = AutoConfig.for_model("gemma3_text", **_SIZES, head_dim=16)
    config.rope_parameters["full_attention"] = {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 48,
    }  # fmt: skip
    assert loader._context_limit(config) == 48
