"""One forward pass of the base model over a packed row of spans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alora_serve.model.loader import BaseModel
from alora_serve.model.step import Span, Step
from alora_serve.model.stock import run_stock


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
        rows = [rows.stop - 1 for rows, want in zip(step.rows, output, strict=True) if want]
        wanted = torch.tensor(rows, device=model.device) if rows else None
        with torch.inference_mode():
            logits = model.lean(step, wanted) if model.lean else run_stock(model.module, model.attention, step, wanted)
        return None if logits is None else logits.float()
