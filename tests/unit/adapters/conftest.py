"""Seeded tiny models of several shapes, and real PEFT adapters saved from them, which are the reference here."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.modules import module_shapes

VOCABULARY_SIZE = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _build(architecture: str) -> PreTrainedModel:
    torch.manual_seed(7)
    match architecture:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**_SIZES))
        case "phi3":
            model = Phi3ForCausalLM(Phi3Config(**_SIZES))
        case "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**_SIZES, head_dim=8))
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCABULARY_SIZE, n_positions=64, n_embd=32, n_layer=3, n_head=4)
            )
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fresh_model() -> Callable[..., PreTrainedModel]:
    """A copy of a tiny model, to be changed at will: ``fresh_model("llama", torch.bfloat16)``."""
    built: dict[str, PreTrainedModel] = {}

    def fresh(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        if architecture not in built:
            built[architecture] = _build(architecture)
        return copy.deepcopy(built[architecture]).to(dtype)

    return fresh


@pytest.fixture(scope="session")
def base_of(fresh_model: Callable[..., PreTrainedModel]) -> Callable[[str], AdapterHost]:
    def base(architecture: str) -> AdapterHost:
        return AdapterHost(
            module_shapes=module_shapes(fresh_model(architecture)),
            vocabulary_size=VOCABULARY_SIZE,
            decode=lambda tokens: " ".join(f"<{token}>" for token in tokens),
            encode=lambda text: tuple(int(token.strip("<>")) for token in text.split()),
        )

    return base


@pytest.fixture(scope="session")
def llama(base_of: Callable[[str], AdapterHost]) -> AdapterHost:
    return base_of("llama")


SaveAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def save_adapter(fresh_model: Callable[..., PreTrainedModel]) -> SaveAdapter:
    """Save a PEFT adapter with random A and B: ``save_adapter(directory, "llama", r=4, target_modules=["q_proj"])``."""

    def save(
        directory: Path,
        architecture: str = "llama",
        *,
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
        **fields: Any,
    ) -> Path:
        torch.manual_seed(seed)
        fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12} | fields
        model = peft.get_peft_model(fresh_model(architecture), peft.LoraConfig(**fields))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter).mul(0.3).to(dtype)
        model.save_pretrained(str(directory))
        (directory / "README.md").unlink(missing_ok=True)
        return directory

    return save


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change fields of a saved ``adapter_config.json``."""

    def edit(directory: Path, **fields: Any) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit
