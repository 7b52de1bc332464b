"""Digests of a model directory: with them the model's KV is named (``kv/keys.py``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from alora_serve.errors import ModelUnsupportedError

IGNORED_CONFIG_FIELDS = frozenset(
    {
        "_name_or_path", "name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype",
        "id2label", "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
        "decoder_start_token_id",
        "output_attentions", "output_hidden_states", "return_dict", "problem_type", "initializer_range",
        "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation",
        "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "summary_type",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "task_specific_params",
        "chunk_size_feed_forward",
        "is_encoder_decoder", "pretraining_tp", "embedding_dropout", "resid_dropout", "hidden_dropout", "dropout",
    }
)  # fmt: skip
"""Fields that do not change an inference forward pass. Every other field, known or not, is part of the KV's name."""


def weights_digest(directory: Path) -> bytes:
    """SHA-256 over the safetensors files, in name order, each length-prefixed.

    Raises:
        ModelUnsupportedError: no safetensors file.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelUnsupportedError(f"{directory} holds no .safetensors weights")
    hasher = hashlib.sha256(b"alora-serve weights")
    for file in files:
        hasher.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            hasher.update(hashlib.file_digest(stream, "sha256").digest())
    return hasher.digest()


def forward_config_digest(config: PreTrainedConfig) -> bytes:
    """SHA-256 over every config field that may affect the forward pass, in canonical JSON."""
    kept = _without_ignored(config.to_dict())
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(b"alora-serve config" + canonical.encode()).digest()


def _without_ignored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_ignored(item) for key, item in value.items() if key not in IGNORED_CONFIG_FIELDS}
    return [_without_ignored(item) for item in value] if isinstance(value, (list, tuple)) else value
