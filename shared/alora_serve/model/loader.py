"""Load a base model unmodified, and refuse what the engine cannot serve exactly.

What is refused, by name: layers that keep state other than keys and values, attention that does not pass through
transformers' attention interface, arguments our attention does not handle, encoder-decoder models. Rotary embeddings
whose frequencies depend on the length seen (``dynamic``, ``longrope``) are served up to the length at which they would
begin to depend on it: beyond, the same tokens have other keys, and a long neighbour in the packed row would change a
short sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alora_serve.errors import ModelUnsupportedError
from alora_serve.kv.layout import KVLayout
from alora_serve.model.attention import PackedAttention
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.device import CPU, native_dtype
from alora_serve.model.digest_cache import kept_weights_digest
from alora_serve.model.digests import forward_config_digest, weights_digest
from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.lean import LeanForward
from alora_serve.model.lean_check import lean_forward
from alora_serve.model.projections import Projection, fuse_projections
from alora_serve.model.shape import LAYOUT_FIELDS, kv_layout
from alora_serve.model.step import Span, Step
from alora_serve.model.weights import WeightLayout, WeightQuantization, best_layout

_log = structlog.get_logger(__name__)

SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model and what names its KV.

    Attributes:
        name: what people call it: the directory's or hub id's last part.
        module: the transformers model, in eval mode, its attention ours.
        attention: our attention function inside it.
        tokenizer: renders, tokenizes and decodes.
        projections: its linear modules, as the engine runs them.
        lean: its forward pass in few calls; None where transformers' code runs.
        layout: shape of a token's KV.
        dtype: compute dtype, ``float32`` or ``bfloat16``.
        weight_layout: how its weights lie: products round differently, and so does all KV.
        weight_quantization: what its weights were rounded to.
        device: where it runs, and its KV lies.
        context_tokens: longest prompt plus answer.
        weights_digest: SHA-256 of the weight files.
        forward_config_digest: SHA-256 of the config fields that affect the forward pass.
    """

    name: str
    module: PreTrainedModel
    attention: PackedAttention
    projections: tuple[Projection, ...]
    lean: LeanForward | None
    tokenizer: ChatTokenizer
    layout: KVLayout
    dtype: str
    weight_layout: WeightLayout
    weight_quantization: WeightQuantization
    device: torch.device
    context_tokens: int
    vocabulary_size: int
    weights_digest: bytes
    forward_config_digest: bytes

    @property
    def model_digest(self) -> bytes:
        """Weights, forward config, tokenizer and chat template: endpoints of equal digest may be paired."""
        parts = (self.weights_digest, self.forward_config_digest, self.tokenizer.digest)
        return hashlib.sha256(b"alora-serve model" + b"".join(parts)).digest()


def load_base_model(
    directory: Path,
    *,
    dtype: str,
    device: torch.device = CPU,
    context_tokens: int | None = None,
    pack: bool = True,
    quantization: WeightQuantization = "none",
    name: str | None = None,
    digests: Path | None = None,
) -> BaseModel:
    """Load a Hugging Face directory for serving.

    Args:
        directory: holds ``config.json``, safetensors weights and a tokenizer.
        dtype: ``float32``, ``bfloat16`` or ``auto`` (see :func:`native_dtype`).
        device: where it runs (see :func:`alora_serve.model.device.open_device`).
        context_tokens: lower the context below what the model allows, or give it where the config names none.
        pack: lay weights out for this processor's kernels (see :func:`alora_serve.model.weights.best_layout`).
        quantization: ``int8`` rounds the linear modules' weights.
        name: what to call it; None: the directory's name.
        digests: where the digest of its weights is kept for the next start; None: nowhere.

    Raises:
        ModelUnsupportedError: a part of the model cannot be served exactly; names it.
    """
    if dtype == "auto":
        dtype = native_dtype(device)
    config = AutoConfig.from_pretrained(directory)
    _check_config(config)
    module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=getattr(torch, dtype), attn_implementation="eager", use_safetensors=True
    )
    nn.Module.to(module, device)
    module.train(False).requires_grad_(False)
    # Integers have one layout.
    packed = pack and quantization == "none"
    weight_layout: WeightLayout = best_layout(module.dtype, module.device) if packed else "plain"
    projections = fuse_projections(module, weight_layout, quantization)
    attention = PackedAttention()
    # One registration a loaded model: the function finds its step without process-wide state.
    implementation = _implementation(attention)
    ALL_ATTENTION_FUNCTIONS.register(implementation, attention)
    module.set_attn_implementation(implementation)
    layout, windows = _probe(module, attention, dtype)
    generation_ids = getattr(module.generation_config, "eos_token_id", None)
    limit = _context_limit(config, context_tokens)
    tokenizer = ChatTokenizer(
        AutoTokenizer.from_pretrained(directory),
        end_of_sequence_ids=[*_ids(config.eos_token_id), *_ids(generation_ids)],
        context_tokens=limit,
    )
    return BaseModel(
        name=name or directory.name,
        module=module,
        attention=attention,
        projections=projections,
        lean=lean_forward(module, projections, attention, layout, windows),
        tokenizer=tokenizer,
        layout=layout,
        dtype=dtype,
        weight_layout=weight_layout,
        weight_quantization=quantization,
        device=device,
        context_tokens=limit,
        vocabulary_size=int(config.vocab_size),
        weights_digest=kept_weights_digest(directory, digests) if digests else weights_digest(directory),
        forward_config_digest=forward_config_digest(config),
    )


def _implementation(attention: PackedAttention) -> str:
    return f"alora_packed_{id(attention):x}"


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _check_config(config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ModelUnsupportedError(f"{config.model_type} is an encoder-decoder model; only decoders are served")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in SERVED_LAYER_TYPES:
            raise ModelUnsupportedError(
                f"layer type {kind!r} of {config.model_type} is not served; served are {sorted(SERVED_LAYER_TYPES)}"
            )
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if not hasattr(config, field):
            raise ModelUnsupportedError(
                f"the config of {config.model_type} has no {field}; only text decoders are served"
            )


def _rope_types(config: PreTrainedConfig) -> dict[str, Mapping[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return {parameters["rope_type"]: parameters}
    return {p["rope_type"]: p for p in parameters.values() if isinstance(p, Mapping) and "rope_type" in p}


def _context_limit(config: PreTrainedConfig, wanted: int | None = None) -> int:
    """Most positions, up to those wanted, for which every token's KV depends on earlier tokens alone.

    Raises:
        ModelUnsupportedError: the config names no length, and none is wanted.
    """
    named = getattr(config, "max_position_embeddings", None) or wanted
    if not named:
        raise ModelUnsupportedError(
            f"the config of {config.model_type} has no max_position_embeddings; set context_tokens "
            "(ALORA_CONTEXT_TOKENS) to the longest prompt plus answer that the model can take"
        )
    limit = int(named)
    for kind, parameters in _rope_types(config).items():
        if kind in _LENGTH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
            _log.warning("context capped where rotary frequencies begin to depend on it", rope=kind, tokens=limit)
    return min(limit, wanted or limit)


def _probe(
    module: PreTrainedModel, attention: PackedAttention, dtype: str
) -> tuple[KVLayout, Mapping[int, int | None]]:
    """Run two tokens and see that every layer's attention came to us, with the window its config says."""
    config = module.config
    layers = int(config.num_hidden_layers)
    calls: list[nn.Module] = []

    class _Recorder(PackedAttention):
        def __call__(self, part: nn.Module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def, override]
            calls.append(part)
            if not tuple(key.shape) == tuple(value.shape) == expected:
                raise ModelUnsupportedError(
                    f"{type(part).__name__} has keys {tuple(key.shape)} and values {tuple(value.shape)}, "
                    f"not the {expected} that its config says"
                )
            return super().__call__(part, query, key, value, mask, **kwargs)

    layout = kv_layout({field: getattr(config, field, None) for field in LAYOUT_FIELDS}, dtype)
    expected = (1, layout.kv_heads, 2, layout.head_dim)
    recorder = _Recorder()
    # Not the name in the config: a model that refused ours still says "eager" there, which is everyone's.
    name = _implementation(attention)
    ALL_ATTENTION_FUNCTIONS.register(name, recorder)
    try:
        segment = KVSegment.allocate(layout, 2, 0, module.device)
        step = Step([Span((0, 1), 0, (), KVSlice(segment, 0, 2))], module.device)
        recorder.begin(step)
        with torch.inference_mode():
            module(input_ids=step.token_ids[None], position_ids=step.positions[None], use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, attention)
    if sorted(recorder.windows_seen) != list(range(layers)) or len(calls) != layers:
        raise ModelUnsupportedError(
            f"{type(module).__name__} sent {len(calls)} of {layers} layers through the attention interface; "
            "layers with attention code or state of their own are not served"
        )
    _check_windows(config, recorder.windows_seen)
    return layout, recorder.windows_seen


def _check_windows(config: PreTrainedConfig, seen: Mapping[int, int | None]) -> None:
    """A window that is applied only through a mask would be lost; see that each layer names its own."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    for layer, given in seen.items():
        expected = window if kinds is None or kinds[layer] == "sliding_attention" else None
        if given != expected:
            raise ModelUnsupportedError(
                f"layer {layer} of {config.model_type} has window {expected} in its config but passes {given}"
            )
