"""The model's linear modules, run as few and as fast products as its shape allows.

Modules that are given the same input (q, k and v; gate and up) become one product over their weights side by side: each
weight is read once a step, and one call serves three. On a CPU weights can be packed: laid out once as oneDNN's kernels
want them. The plain layout is re-ordered at every call, or runs a slow kernel for few rows, but its products are those
of the modules themselves, and in fp32 they round less. The transformers model stays as it is: its modules ask their
projection instead of multiplying themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alora_serve.model.threads import ThreadsFor

FUSED_SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that transformers' models give the same input, by their usual names."""

PACKED_ROWS: Final = 8
"""What oneDNN lays weights out for: decode steps of a few sequences. Larger products lose nothing by it."""

Adapt = Callable[[Tensor, Tensor], None]
"""Adds to the output ``[rows, out_features]``, in place, what adapters make of the input ``[rows, in_features]``."""


class Projection:
    """Linear modules on one input, as one product.

    Attributes:
        names: full names of the modules.
        columns: of each module, its columns of the product.
        adapt: set for the steps in which an adapter changes one of the modules.
    """

    def __init__(self, names: Sequence[str], modules: Sequence[nn.Module], *, pack: bool) -> None:
        self.names = tuple(names)
        weights = [_weight(module) for module in modules]
        self.in_features = weights[0].shape[1]
        self.columns = tuple(_columns([weight.shape[0] for weight in weights]))
        self.adapt: Adapt | None = None
        fused = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [getattr(module, "bias", None) for module in modules]
        self._bias = torch.cat([bias.detach() for bias in biases if bias is not None]) if None not in biases else None
        self._is_packed = pack
        self._weight = torch.ops.mkldnn._reorder_linear_weight(fused, PACKED_ROWS) if pack else fused
        self._weight_count = fused.numel()
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        for index, module in enumerate(modules):
            # The weight is here now; its shape stays there for whoever asks.
            shape = module.get_parameter("weight").shape
            module.weight = nn.Parameter(torch.empty(shape, dtype=fused.dtype, device="meta"), requires_grad=False)
            module.forward = partial(self._member, index)

    def __call__(self, x: Tensor) -> Tensor:
        """All modules' products of ``x`` ``[rows, in_features]``, adapters included: ``[rows, columns]``."""
        with ThreadsFor(self._weight_count * x.element_size(), x.shape[0] * self._weight_count):
            out = self._product(x)
        if self.adapt is not None:
            self.adapt(x, out)
        return out

    def _product(self, x: Tensor) -> Tensor:
        if self._is_packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return out
        return linear(x, self._weight, self._bias)

    def _member(self, index: int, x: Tensor) -> Tensor:
        """What one module answers to ``[..., in_features]``. The first one asked makes the product for all."""
        if x is not self._input or self._output is None:
            self._input, self._output = x, self(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        out = self._output[..., self.columns[index]]
        if index == len(self.columns) - 1:
            self._input = self._output = None
        return out


def fuse_projections(model: PreTrainedModel, *, pack: bool) -> tuple[Projection, ...]:
    """Put every ``Linear`` and ``Conv1D`` of ``model`` under a projection, siblings under one.

    An output layer tied to the embedding is held twice if packed: it is a fifth of a small model's step, and takes half
    the time then for one sequence and a third for sixteen.

    Args:
        pack: lay weights out for oneDNN; only where it :func:`can <can_pack>`.
    """
    names = {module: name for name, module in model.named_modules()}
    return tuple(Projection([names[part] for part in group], group, pack=pack) for group in _groups(model))


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


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """This processor has oneDNN kernels for the dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros((8, 8), dtype=dtype), PACKED_ROWS)
    except RuntimeError:  # torch's way to say that bfloat16 is not native here
        return False
    return True


def _weight(module: nn.Module) -> Tensor:
    """``[out_features, in_features]``."""
    weight = module.get_parameter("weight").detach()
    return weight.t().contiguous() if isinstance(module, Conv1D) else weight


def _columns(widths: Sequence[int]) -> Iterator[slice]:
    first = 0
    for width in widths:
        yield slice(first, first + width)
        first += width
