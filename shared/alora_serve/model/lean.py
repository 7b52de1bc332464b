"""The forward pass of Llama-shaped models in as few calls as it takes.

transformers' modules cost more than their arithmetic when a step has a handful of rows: each layer runs some forty
small operations inside a dozen module calls. For models whose layers are exactly Llama's, this is the same arithmetic
in the same order of rounding, on the model's own parameters; every other model runs transformers' code. Whether a model
fits is checked at load against that code (``lean_check.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from alora_serve.model.packed_row import PackedRow, ScoreRules
from alora_serve.model.projections import Projection
from alora_serve.model.step import Step
from alora_serve.model.threads import ThreadsFor

ACTIVATION_MULTIPLICATIONS: Final = 10
"""What the activation of a number and its product with another cost: some 0.3 ns."""

LLAMA_SHAPED: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})
"""Models whose decoder layers differ from Llama's in nothing but biases and windows."""


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root mean square normalisation, as ``LlamaRMSNorm``."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(module.weight, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean = wide.square().mean(-1, keepdim=True)
        return self.weight * (wide * mean.add_(self.epsilon).rsqrt_()).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    before_attention: _Norm
    qkv: Projection
    o: Projection
    before_mlp: _Norm
    gate_up: Projection
    down: Projection
    activation: Any
    rules: ScoreRules


class LeanForward:
    """Runs a Llama-shaped model. One thread.

    Args:
        model: one of :data:`LLAMA_SHAPED`.
        projections: of all its linear modules.
        windows: of each layer, as the model passes it to attention.
    """

    def __init__(
        self, model: PreTrainedModel, projections: Sequence[Projection], windows: Mapping[int, int | None]
    ) -> None:
        of = {name: projection for projection in projections for name in projection.names}
        decoder: Any = model.model
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._rotary = decoder.rotary_emb
        self._norm = _Norm.of(decoder.norm)
        self._output = of["lm_head"]
        self._kv_heads = int(model.config.num_key_value_heads)
        self._heads = int(model.config.num_attention_heads)
        self._layers = []
        for index, layer in enumerate(decoder.layers):
            prefix, attention = f"model.layers.{index}", layer.self_attn
            self._layers.append(
                _Layer(
                    before_attention=_Norm.of(layer.input_layernorm),
                    qkv=of[f"{prefix}.self_attn.q_proj"],
                    o=of[f"{prefix}.self_attn.o_proj"],
                    before_mlp=_Norm.of(layer.post_attention_layernorm),
                    gate_up=of[f"{prefix}.mlp.gate_proj"],
                    down=of[f"{prefix}.mlp.down_proj"],
                    activation=layer.mlp.act_fn,
                    rules=ScoreRules(attention.scaling, None, windows[index]),
                )
            )

    @property
    def has_windows(self) -> bool:
        """What a row sees of a slice depends on its position."""
        return any(layer.rules.window is not None for layer in self._layers)

    def __call__(self, step: Step, wanted: Tensor | None) -> Tensor | None:
        """Compute the step's KV in place, and the logits of some rows.

        Args:
            wanted: indices of rows; None where no logits are.

        Returns:
            ``[wanted, vocabulary]`` in the model's dtype, or None.
        """
        heads, kv_heads = self._heads, self._kv_heads
        hidden = embedding(step.token_ids, self._embedding)
        cos, sin = self._rotary(hidden, step.positions[None])
        half = cos.shape[-1] // 2
        cos = cos[0].unsqueeze(1)
        # rotate_half negates the second half and then multiplies; the sign is put on the factor instead, exactly.
        sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1).unsqueeze(1)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.before_attention(hidden)).view(len(hidden), heads + 2 * kv_heads, -1)
            turning = qkv[:, : heads + kv_heads]
            swapped = torch.cat((turning[..., half:], turning[..., :half]), dim=-1)
            turned = (turning * cos).add_(swapped.mul_(sin))
            query = turned[:, :heads].unflatten(1, (kv_heads, -1))
            row = PackedRow(step, index, query, turned[:, heads:], qkv[:, heads + kv_heads :], layer.rules)
            hidden = hidden + layer.o(row.attend().flatten(1))
            gate_up = layer.gate_up(layer.before_mlp(hidden))
            gate, up = gate_up[:, layer.gate_up.columns[0]], gate_up[:, layer.gate_up.columns[1]]
            with ThreadsFor(0, gate.numel() * ACTIVATION_MULTIPLICATIONS):
                inner = layer.activation(gate) * up
            hidden = hidden + layer.down(inner)
        return None if wanted is None else self._output(self._norm(hidden[wanted]))
