"""Fused attention kernels of a GPU that tell their log-sum-exp, each held to the definition before it is used.

Which kernels torch has for a card, a dtype and a head size is its own affair, and so is how exactly they compute: one
that multiplied float32 in TF32 would break the promise of equal tokens without an error. So at load, when the first
attention is computed, a kernel must answer two small problems as float64 does, or the next one is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Final

import structlog
import torch
from torch import Tensor

_log = structlog.get_logger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""``(query, key, value, scale, causal)`` to what :func:`alora_serve.model.attention_kernels.attend` returns."""

TOLERANCE: Final = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest difference accepted, of the largest value. TF32 is off by some 1e-3."""


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention: 16-bit dtypes, cards of capability 8 and up."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def memory_efficient(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The CUTLASS kernel: float32 too, and older cards. It pads the log-sum-exp to a multiple of 32 queries."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : query.shape[-2]]


@cache
def fused_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """The first kernel that is right on this device; None where none is."""
    return choose_kernel({"flash": flash, "memory efficient": memory_efficient}, device, dtype, head_dim)


def choose_kernel(
    kernels: Mapping[str, Kernel], device: torch.device, dtype: torch.dtype, head_dim: int
) -> Kernel | None:
    """The first of the kernels that answers as float64 does, within the rounding of ``dtype``."""
    about = {"device": str(device), "dtype": str(dtype), "head_dim": head_dim}
    for name, kernel in kernels.items():
        try:
            difference = max(_differences(kernel, device, dtype, head_dim))
        except RuntimeError as error:
            _log.info("attention kernel does not take this", kernel=name, error=str(error), **about)
            continue
        if difference <= TOLERANCE[dtype]:
            _log.info("attention kernel", kernel=name, difference=difference, **about)
            return kernel
        _log.warning("attention kernel is wrong and not used", kernel=name, difference=difference, **about)
    _log.warning("no fused attention kernel; every score is written to memory", **about)
    return None


def _differences(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[float]:
    """How far answers and log-sum-exps are from float64's, as parts of the largest value; NaN counts as infinitely."""
    scale = head_dim**-0.5
    for query, key, value, causal in _problems(device, dtype, head_dim):
        scores = query.double() @ key.double().transpose(-1, -2) * scale
        if causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        expected = torch.softmax(scores, dim=-1) @ value.double(), torch.logsumexp(scores, dim=-1)
        for found, right in zip(kernel(query, key, value, scale, causal), expected, strict=True):
            if found.shape != right.shape:
                yield math.inf
                continue
            difference = float((found.double() - right).abs().max() / right.abs().max())
            yield math.inf if math.isnan(difference) else difference


def _problems(device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """Queries on a slice in the middle of a segment, and a span on itself whose query heads share keys and values."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, head_dim, generator=generator).to(device, dtype)

    segment = normal(2, 2, 130)[:, :, 17:117]
    yield normal(1, 2, 7), segment[0].unsqueeze(0), segment[1].unsqueeze(0), False
    rows, kv_heads, group = 41, 2, 3
    packed = normal(rows, kv_heads * (group + 2))
    heads = kv_heads * group
    query = packed[:, :heads].view(rows, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    key, value = (part.transpose(0, 1).unsqueeze(1) for part in torch.chunk(packed[:, heads:], 2, dim=1))
    yield query, key.expand(query.shape), value.expand(query.shape), True
