"""One forward pass of the base model over a packed row of spans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alora_serve.model.loader import BaseModel
from alora_serve.model.step import Span, Step


class ModelRunner:
    """Runs steps on a base model. Used by one thread at a time: the model's attention holds the step's plan."""

    def __init__(self, model: BaseModel) -> None:
        self._model = model

    def forward(self, spans: Sequence[Span], output: Sequence[bool]) -> Tensor | None:
        """Compute the KV of every span's tokens in place, and logits for the last token of some.

        Args:
            spans: at least one; tokens of all spans together form the packed row, in this order.
            output: for each span, whether its last token's logits are wanted.

        Returns:
            ``[wanted, vocabulary]`` float32 in the order of the spans, or None when none is wanted (the output layer,
            a large share of a small model, is not run then).
        """
        model = self._model
        step = Step(spans, model.device)
        wanted = [rows.stop - 1 for rows, want in zip(step.rows, output, strict=True) if want]
        arguments = {"input_ids": step.token_ids[None], "position_ids": step.positions[None], "use_cache": False}
        model.attention.begin(step)
        try:
            with torch.inference_mode():
                if not wanted:
                    model.module.base_model(**arguments)
                    return None
                keep = torch.tensor(wanted, device=model.device)
                logits: Tensor = model.module(**arguments, logits_to_keep=keep).logits
                return logits[0].float()
        finally:
            model.attention.end()
