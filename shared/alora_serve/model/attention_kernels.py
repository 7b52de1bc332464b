"""Attention with its log-sum-exp, by the fastest kernel of the device that does what is asked."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from alora_serve.model.device_kernels import fused_kernel
from alora_serve.model.threads import ThreadsFor
from alora_serve.model.wide_attention import attend_widely, suits

HEAD_MULTIPLICATIONS: Final = 100_000
"""What the two products of one head cost besides their arithmetic, as multiplications: some 4 us."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    only_decodes: bool = False,
) -> tuple[Tensor, Tensor]:
    """``softmax(cap(query @ key * scale) + mask) @ value`` and its log-sum-exp.

    A fused kernel where scores need no cap and every query sees something; written out otherwise. A query that sees
    nothing gets zeros and ``-inf``.

    Args:
        query: ``[batch, heads, n, head_dim]``.
        key: ``[batch, heads, tokens, head_dim]``; any strides, the last dimension contiguous.
        value: as ``key``.
        softcap: ``tanh(score / softcap) * softcap`` before the softmax.
        mask: added to scores, broadcast to ``[batch, heads, n, tokens]``: 0 or ``-inf``, in the query's dtype.
        causal: ``n == tokens`` and query i sees keys up to i; not together with a cap or mask.
        only_decodes: no sequence has more than one query.

    Returns:
        ``[batch, heads, n, head_dim]`` and float32 ``[batch, heads, n]``.
    """
    if softcap is None and mask is None and not causal and not only_decodes and suits(query, key):
        return attend_widely(query, key, value, scale)
    if softcap is None and query.device.type == "cpu" and (mask is None or mask.dim() == 4):
        # A mask of four dimensions comes with queries that see at least themselves.
        read = key.numel() + value.numel()
        products = HEAD_MULTIPLICATIONS * key.shape[0] * key.shape[1]
        with ThreadsFor(read * key.element_size(), read * query.shape[2] + products):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, causal, attn_mask=mask, scale=scale
            )
        return out, lse
    if query.device.type == "cuda" and softcap is None and mask is None:
        kernel = fused_kernel(query.device, query.dtype, query.shape[-1])
        if kernel is not None:
            return kernel(query, key, value, scale, causal)
    if causal:
        hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    return _written_out(query, key, value, scale, softcap, mask)


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num_(0.0)
    return torch.matmul(weights.to(value.dtype), value), lse
