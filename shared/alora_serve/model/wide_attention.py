"""Attention of many rows in bfloat16, written out, where products of bfloat16 numbers outrun torch's fused kernel.

On processors that multiply bfloat16 but have no tiles (AVX512-BF16 without AMX: AMD's since Zen 4), the kernel computes
in float32. oneDNN's products are several times as fast, and round what they return to bfloat16: too coarse for scores,
so a second product returns what the first one's rounding lost:

    coarse = bf16(q k),   lost = bf16(q k - coarse),   score = coarse + lost    (16 digits)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Final

import torch
from torch import Tensor

from alora_serve.model.lanes import lanes, run_in_lanes

LEAST_SCORES: Final = 190_000
"""Of a head: for fewer, calls cost more than they gain. The fused kernel takes 0.9 ms for as many."""

LEAST_ROWS: Final = 96
"""Of a head: with fewer, reading keys is most of the work, and the kernel does it as well."""

FEWEST_ROWS: Final = 48
MOST_ROWS: Final = 384
"""Of a part. Fewer would read keys too often, and more spill over the cache."""

PART_SCORES: Final = 2**19
"""Of a part: 2 MB of them in float32, more or less what a core's cache holds."""


def suits(query: Tensor, key: Tensor) -> bool:
    """Whether :func:`attend_widely` is the fastest way, for its arguments.

    Not of rows that only decode: in a worker, their steps took longer with it (ADR 32).
    """
    rows, tokens = query.shape[2], key.shape[2]
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and rows >= LEAST_ROWS
        and rows * tokens >= LEAST_SCORES
        and _has_fast_products()
        and lanes() > 0
    )


@cache
def _has_fast_products() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def attend_widely(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(query @ key * scale) @ value`` and its log-sum-exp.

    Args:
        query: ``[batch, heads, n, head_dim]`` bfloat16.
        key: ``[batch, heads, tokens, head_dim]``; any strides, the last dimension contiguous.
        value: as ``key``.

    Returns:
        ``[batch, heads, n, head_dim]`` and float32 ``[batch, heads, n]``.
    """
    batch, heads, n, _ = query.shape
    count = max(1, lanes())
    pieces = -(-n // min(MOST_ROWS, max(FEWEST_ROWS, PART_SCORES // key.shape[2])))
    pieces = min(pieces + -pieces % count, max(1, n // FEWEST_ROWS))  # as many of a head for each lane
    rows = -(-n // pieces)
    out = torch.empty((*query.shape[:3], value.shape[3]), dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    parts: list[Callable[[], None]] = []
    for item in range(batch):
        for head in range(heads):
            turned, values = key[item, head].t(), value[item, head]
            for first in range(0, n, rows):
                these = (item, head, slice(first, first + rows))
                parts.append(partial(_part, query[these], turned, values, scale, out[these], lse[these]))
    run_in_lanes(parts, count)
    return out, lse


def _part(query: Tensor, turned: Tensor, value: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Some rows of one head: ``[rows, head_dim]``, ``[head_dim, tokens]`` and ``[tokens, head_dim]``, into ``out``."""
    coarse = torch.mm(query, turned)
    scores = coarse.float().add_(torch.addmm(coarse, query, turned, beta=-1)).mul_(scale)
    weights = torch.softmax(scores, dim=-1)
    # The largest weight is exp(largest score - log-sum-exp), and no less than one of as many as there are keys.
    torch.sub(scores.amax(-1), weights.amax(-1).log_(), out=lse)
    torch.mm(weights.to(value.dtype), value, out=out)
