"""Writes a trained adapter as stock PEFT reads it, with a config that names no path of this machine."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from transformers import PreTrainedModel

from alora_serve.training.recipe import Recipe
from alora_serve.types import TokenIds


def new_adapter(base: PreTrainedModel, recipe: Recipe, invocation_tokens: TokenIds) -> PeftModel:
    """``base`` with a fresh adapter of float32 on it; the recipe's seed draws its weights."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        alora_invocation_tokens=list(invocation_tokens) or None,
    )
    with warnings.catch_warnings():
        # PEFT reads a property of transformers that has a newer name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(base, config)


def save_adapter(model: PeftModel, directory: Path, base_name: str, dtype: torch.dtype) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, and check that PEFT loads what was trained.

    The model's adapter is of ``dtype`` afterwards, and it is the base alone again: it is of no further use here.

    Raises:
        RuntimeError: what PEFT loads differs from what was trained.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    trained: dict[str, torch.Tensor] = {}
    parameter: torch.Tensor
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            trained[name] = parameter.detach().clone()
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's own empty card
    config_path = directory / "adapter_config.json"
    written = json.loads(config_path.read_text())
    written["target_modules"] = sorted(written["target_modules"])  # PEFT writes a set, whose order changes by process
    config_path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    # safetensors lets nobody else read what it writes, and services run as another user.
    shutil.copymode(config_path, directory / "adapter_model.safetensors")
    loaded = dict(PeftModelForCausalLM.from_pretrained(model.unload(), str(directory)).named_parameters())
    for name, parameter in trained.items():
        if not torch.equal(loaded[name].float(), parameter.float()):
            raise RuntimeError(f"{directory}: PEFT loads another {name} than was trained")
