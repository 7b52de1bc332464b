"""Whether a model may run the lean forward pass: it must be Llama-shaped by name, and answer as its own code does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alora_serve.kv.layout import KVLayout
from alora_serve.model.attention import PackedAttention
from alora_serve.model.kv_memory import KVSegment, KVSlice
from alora_serve.model.lean import LLAMA_SHAPED, LeanForward
from alora_serve.model.projections import Projection
from alora_serve.model.step import Span, Step
from alora_serve.model.stock import run_stock

_log = structlog.get_logger(__name__)

PROBE_TOKENS: Final = 24
TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference accepted, of the largest logit. Both round alike; what is left is the order of sums in kernels."""


def lean_forward(
    model: PreTrainedModel,
    projections: Sequence[Projection],
    attention: PackedAttention,
    layout: KVLayout,
    windows: Mapping[int, int | None],
) -> LeanForward | None:
    """The lean forward of a model that it fits, checked against the stock one; None for every other model."""
    if type(model).__name__ not in LLAMA_SHAPED:
        return None
    try:
        lean = LeanForward(model, projections, windows)
    except (AttributeError, KeyError) as error:
        _log.warning("model is not built like Llama; running transformers' code", missing=str(error))
        return None
    tokens = tuple(token % int(model.config.vocab_size) for token in range(1, PROBE_TOKENS + 1))
    every = torch.arange(PROBE_TOKENS, device=model.device)
    with torch.inference_mode():
        expected = run_stock(model, attention, _probe_step(layout, tokens, model.device), every)
        found = lean(_probe_step(layout, tokens, model.device), every)
    if not _agree(found, expected):
        _log.warning("the lean forward differs from transformers' code, which runs instead", model=type(model).__name__)
        return None
    return lean


def _probe_step(layout: KVLayout, tokens: tuple[int, ...], device: torch.device) -> Step:
    segment = KVSegment.allocate(layout, len(tokens), 0, device)
    return Step([Span(tokens, 0, (), KVSlice(segment, 0, len(tokens)))], device)


def _agree(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= TOLERANCE[expected.dtype] * expected.float().abs().max())
