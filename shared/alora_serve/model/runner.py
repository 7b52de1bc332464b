"""One forward pass of the base model over a packed row of spans."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Final

import torch
from torch import Tensor

from alora_serve.model.decode_replay import READ_MULTIPLE, DecodeReplay, can_replay, decode_replay
from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.loader import BaseModel
from alora_serve.model.step import Span, Step
from alora_serve.model.stock import run_stock
from alora_serve.model.threads import ThreadsFor

OPERATION_MULTIPLICATIONS: Final = 3
"""What an operation on one number of a row costs: some 0.1 ns, as rows lie in a core's cache."""


class ModelRunner:
    """Runs steps on a base model. Used by one thread at a time: the model's attention holds the step's plan.

    Args:
        replay: replays its decode steps; by default where the device gains by it.
    """

    def __init__(self, model: BaseModel, replay: DecodeReplay | None = None) -> None:
        self._model = model
        self._replay = replay or decode_replay(model.lean, model.device)
        self._features = min(projection.in_features for projection in model.projections)

    def forward(self, spans: Sequence[Span], output: Sequence[int], adapters: object = None) -> Tensor | None:
        """Compute the KV of every span's tokens in place, and logits for the last tokens of some.

        Args:
            spans: at least one; tokens of all spans together form the packed row, in this order.
            output: for each span, of how many of its last tokens logits are wanted.
            adapters: stands for those that are on (see :class:`DecodeReplay`).

        Returns:
            ``[wanted, vocabulary]`` float32 in the order of the spans, or None when none is wanted (the output layer,
            a large share of a small model, is not run then). Valid until the next call.
        """
        step = Step(spans, self._model.device, read_multiple=READ_MULTIPLE if self._replay else 1)
        rows = [
            row for span, count in zip(step.rows, output, strict=True) for row in range(span.stop - count, span.stop)
        ]
        wanted = torch.tensor(rows, device=self._model.device) if rows else None
        # A step is a thousand small calls beside its products and attentions, which choose for themselves.
        with torch.inference_mode(), ThreadsFor(0, step.total_rows * self._features * OPERATION_MULTIPLICATIONS):
            logits = self._logits(step, wanted, adapters)
        return None if logits is None else logits.float()

    def _logits(self, step: Step, wanted: Tensor | None, adapters: object) -> Tensor | None:
        model = self._model
        if self._replay is not None:
            if wanted is not None and len(wanted) == step.total_rows and can_replay(step):
                return self._replay.run(step, wanted, adapters)
            self._replay.forget()
        return model.lean(step, wanted) if model.lean else run_stock(model.module, model.attention, step, wanted)


def measure_prefill(model: BaseModel, tokens: int) -> float:
    """Prompt tokens a second of one pass over so many, at most the context's, that mean nothing and leave nothing."""
    count = min(tokens, model.context_tokens)
    segment = KVSegment.allocate(model.layout, count, 0, model.device)
    ids = tuple(place % model.vocabulary_size for place in range(count))
    began = monotonic()
    logits = ModelRunner(model).forward([Span(ids, 0, (), KVSlice(segment, 0, count))], [1])
    if logits is None:
        raise RuntimeError("no logits of a span whose last token's are wanted")
    logits.argmax().item()  # what a GPU was told to do is done once there is a number
    return count / (monotonic() - began)
