"""The model's linear modules, run as few and as fast products as its shape allows.

Modules that are given the same input (q, k and v; gate and up) become one product over their weights side by side: each
weight is read once a step, and one call serves three. How weights lie is for ``weights.py``; plain ones answer as the
modules themselves. The transformers model stays as it is: its modules ask their projection instead of multiplying
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alora_serve.model.threads import ThreadsFor
from alora_serve.model.weights import WeightLayout, WeightQuantization, lay_out

FUSED_SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that transformers' models give the same input, by their usual names."""

Adapt = Callable[[Tensor, Tensor], None]
"""Adds to the output ``[rows, out_features]``, in place, what adapters make of the input ``[rows, in_features]``."""


class Projection:
    """Linear modules on one input, as one product.

    Attributes:
        names: full names of the modules.
        columns: of each module, its columns of the product.
        adapt: set for the steps in which an adapter changes one of the modules.
    """

    def __init__(
        self,
        names: Sequence[str],
        modules: Sequence[nn.Module],
        layout: WeightLayout,
        quantization: WeightQuantization = "none",
    ) -> None:
        self.names = tuple(names)
        parts = [_weight(module) for module in modules]
        self.in_features = parts[0].shape[1]
        self.columns = tuple(_columns([part.shape[0] for part in parts]))
        self.adapt: Adapt | None = None
        biases = [getattr(module, "bias", None) for module in modules]
        given = [None if bias is None else bias.detach() for bias in biases]
        self.weights = lay_out(parts, given, layout, quantization)
        self._weight_count = sum(part.numel() for part in parts)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        for index, module in enumerate(modules):
            # The weight is here now; its shape stays there for whoever asks.
            shape = module.get_parameter("weight").shape
            module.weight = nn.Parameter(torch.empty(shape, dtype=parts[0].dtype, device="meta"), requires_grad=False)
            module.forward = partial(self._member, index)

    def __call__(self, x: Tensor) -> Tensor:
        """All modules' products of ``x`` ``[rows, in_features]``, adapters included: ``[rows, columns]``."""
        with ThreadsFor(self.weights.bytes_read, x.shape[0] * self._weight_count):
            out = self.weights.product(x)
        if self.adapt is not None:
            self.adapt(x, out)
        return out

    def _member(self, index: int, x: Tensor) -> Tensor:
        """What one module answers to ``[..., in_features]``. The first one asked makes the product for all."""
        if x is not self._input or self._output is None:
            self._input, self._output = x, self(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        out = self._output[..., self.columns[index]]
        if index == len(self.columns) - 1:
            self._input = self._output = None
        return out


def fuse_projections(
    model: PreTrainedModel, layout: WeightLayout, quantization: WeightQuantization = "none"
) -> tuple[Projection, ...]:
    """Put every ``Linear`` and ``Conv1D`` of ``model`` under a projection, siblings under one.

    An output layer tied to the embedding is held twice unless plain: it is a fifth of a small model's step, and takes
    half the time then for one sequence and a third for sixteen.
    """
    names = {module: name for name, module in model.named_modules()}
    return tuple(Projection([names[part] for part in group], group, layout, quantization) for group in _groups(model))


def _groups(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    grouped = set[nn.Module]()
    for parent in model.modules():
        for siblings in FUSED_SIBLINGS:
            found = [part for part in (getattr(parent, name, None) for name in siblings) if isinstance(part, nn.Linear)]
            alike = {(part.in_features, part.bias is None) for part in found}
            if len(found) == len(siblings) and len(alike) == 1:
                grouped.update(found)
                yield list(found)
    for part in model.modules():
        if isinstance(part, (nn.Linear, Conv1D)) and part not in grouped:
            yield [part]


def _weight(module: nn.Module) -> Tensor:
    """``[out_features, in_features]``."""
    weight = module.get_parameter("weight").detach()
    return weight.t().contiguous() if isinstance(module, Conv1D) else weight


def _columns(widths: Sequence[int]) -> Iterator[slice]:
    first = 0
    for width in widths:
        yield slice(first, first + width)
        first += width
