"""The forward pass as transformers' own code runs it, on a packed row."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from alora_serve.model.attention import PackedAttention
from alora_serve.model.step import Step


def run_stock(module: PreTrainedModel, attention: PackedAttention, step: Step, wanted: Tensor | None) -> Tensor | None:
    """Compute the step's KV in place, and the logits of some rows. Under inference mode.

    Args:
        wanted: indices of rows; None where no logits are: the output layer, a large share of a small model, is not run.

    Returns:
        ``[wanted, vocabulary]`` in the model's dtype, or None.
    """
    arguments = {"input_ids": step.token_ids[None], "position_ids": step.positions[None], "use_cache": False}
    attention.begin(step)
    try:
        if wanted is None:
            module.base_model(**arguments)
            return None
        logits: Tensor = module(**arguments, logits_to_keep=wanted).logits
        return logits[0]
    finally:
        attention.end()
