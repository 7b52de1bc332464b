"""Weights of one product, laid out for the kernel that multiplies by them.

Reading weights is most of a decode step, so a layout is worth what it saves of that. All of them hold the model's own
values: ``half`` stores float32 weights in 16 bits only where not one bit is lost, as of a checkpoint in bfloat16. Only
``int8``, which somebody has to ask for, changes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

WeightQuantization = Literal["none", "int8"]
"""What the weights themselves are rounded to."""

WeightLayout = Literal["plain", "packed", "half"]
"""Which kernels multiply, and so how products round. A layout other than ``plain`` is a wish: a matrix that a kernel
does not take is laid out for the next one, which depends on its values alone."""

PACKED_ROWS: Final = 8
"""What oneDNN lays weights out for: decode steps of a few sequences. Larger products lose nothing by it."""

INT8_ROWS: Final = 48
"""Up to so many rows torch's int8 kernel is faster than widening the weights and multiplying by those."""


class Weights(Protocol):
    """``[out_features, in_features]`` and a bias."""

    @property
    def bytes_read(self) -> int:
        """What a product reads."""

    def product(self, x: Tensor) -> Tensor:
        """``[rows, in_features]`` to ``[rows, out_features]``, in the dtype of ``x``."""


class PlainWeights:
    """As they are: the products of the model's own modules."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self._bias = bias

    @property
    def bytes_read(self) -> int:
        """All of it."""
        return self.weight.nbytes

    def product(self, x: Tensor) -> Tensor:
        """By torch's own kernel, which re-orders weights at every call or is slow for few rows."""
        return linear(x, self.weight, self._bias)


class PackedWeights:
    """Laid out once for oneDNN's kernels, as torch's compiler does it for CPUs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.bytes_read = weight.nbytes
        self._bias = bias

    def product(self, x: Tensor) -> Tensor:
        """By oneDNN."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self._bias, "none", [], "")
        return out


class HalfWeights:
    """float32 weights of which 16 bits say everything, multiplied in float32 by FBGEMM's kernels.

    Half as much is read. float16 has more digits than bfloat16 and a shorter range, so the whole matrix is first
    multiplied by a power of two that puts its largest value near the top of the range, and products by its inverse.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        scaled_bias = None if bias is None else bias * scale
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight * scale, scaled_bias)
        self._unscale = 1.0 / scale
        self.bytes_read = weight.nbytes // 2

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> HalfWeights | None:
        """None where a value would change."""
        if not weight.isfinite().all():  # packing makes the largest float16 of an infinity
            return None
        for scale in (1.0, _range_scale(weight)):
            if torch.equal((weight * scale).half().float() / scale, weight):
                return cls(weight, bias, scale)
        return None

    def product(self, x: Tensor) -> Tensor:
        """By FBGEMM: 16-bit weights are widened in registers, products and sums are float32."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out if self._unscale == 1.0 else out.mul_(self._unscale)


class Int8Weights:
    """Each output's weights as integers up to 127 times a step of its own; activations keep their dtype.

    A quarter of float32's memory. The step is a bfloat16 number, since the kernel for few rows wants it so: that kernel
    also rounds activations to bfloat16. More rows than :data:`INT8_ROWS` multiply by the widened integers instead.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        largest = weight.abs().amax(dim=1).float()
        # Rounded up, so that no integer exceeds 127: bfloat16 has 8 digits.
        step = (largest / 127 * (1 + 2**-8)).bfloat16()
        self._steps = torch.where(step == 0, torch.ones_like(step), step)
        self._integers = (weight.float() / self._steps.float().unsqueeze(1)).round_().to(torch.int8)
        self._bias = bias
        # torch's kernel reads inputs eight at a time, and beyond the end where they do not come out even.
        self._kernel_rows = INT8_ROWS if weight.device.type == "cpu" and weight.shape[1] % 8 == 0 else 0
        self.bytes_read = self._integers.nbytes

    def product(self, x: Tensor) -> Tensor:
        """By torch's kernel for few rows; by the dtype's own product for more."""
        if x.shape[0] <= self._kernel_rows:
            out: Tensor = torch._weight_int8pack_mm(x.bfloat16(), self._integers, self._steps).to(x.dtype)
            return out if self._bias is None else out.add_(self._bias)
        return linear(x, self._integers.to(x.dtype).mul_(self._steps.to(x.dtype).unsqueeze(1)), self._bias)


def _range_scale(weight: Tensor) -> float:
    """The power of two that puts the largest value into ``[2**14, 2**15)``."""
    largest = float(weight.abs().max())
    return 2.0 ** (15 - torch.frexp(torch.tensor(largest)).exponent.item()) if largest else 1.0


def lay_out(
    parts: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    layout: WeightLayout,
    quantization: WeightQuantization = "none",
) -> Weights:
    """One product over ``parts``, one below the other, in this layout or the nearest one that its values allow.

    Args:
        parts: ``[out_features, in_features]`` each.
        biases: of each part; all of them or none.
        quantization: ``int8`` has a layout of its own.
    """
    weight = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    given = [bias for bias in biases if bias is not None]
    bias = torch.cat(given) if given else None
    if quantization == "int8":
        return Int8Weights(weight, bias)
    if layout == "half":
        half = HalfWeights.of(weight, bias)
        if half is not None:
            return half
    return PlainWeights(weight, bias) if layout == "plain" else PackedWeights(weight, bias)


def best_layout(dtype: torch.dtype, device: torch.device) -> WeightLayout:
    """The fastest layout that this processor has kernels for."""
    if device.type != "cpu" or not _has_onednn(dtype):
        return "plain"
    return "half" if dtype == torch.float32 and _has_fbgemm() else "packed"


def _has_fbgemm() -> bool:
    return torch.backends.quantized.engine in ("fbgemm", "x86")


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros((8, 8), dtype=dtype), PACKED_ROWS)
    except RuntimeError:  # torch's way to say that bfloat16 is not native here
        return False
    return True
