"""Choosing the next token. Random numbers are keyed by seed, sample index and position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alora_serve.types import SamplingParams


def uniform(seed: int, sample_index: int, position: int) -> float:
    """The random number in [0, 1) of one draw: Philox keyed by seed and sample index, counted by position."""
    # Typed: numpy makes floats of a list that holds numbers on both sides of 2**63, and seeds would run together.
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, sample_index], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(np.random.Generator(generator).random())


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
) -> tuple[list[int], list[float | None]]:
    """The next token of each row, and its log-probability where asked.

    Args:
        logits: ``[rows, vocabulary]`` float32; changed in place.
        params: of each row; ``seed`` is set where ``temperature`` is not 0.
        prompts: prompt tokens of each row, for the repetition penalty.
        generated: tokens generated so far of each row; their number is the position of the draw.

    Returns:
        Token ids, and natural-log probabilities of the unmodified distribution (None where not asked).
    """
    raw = torch.log_softmax(logits, dim=-1) if any(p.logprobs for p in params) else None
    for row, param in enumerate(params):
        _penalize(logits[row], param, prompts[row], generated[row])
    tokens = logits.argmax(dim=-1).tolist()
    for row, param in enumerate(params):
        if param.temperature > 0.0:
            tokens[row] = _draw(logits[row], param, len(generated[row]))
    logprobs = [
        float(raw[row, token]) if raw is not None and param.logprobs else None
        for row, (token, param) in enumerate(zip(tokens, params, strict=True))
    ]
    return tokens, logprobs


def _penalize(row: Tensor, param: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
    if param.repetition_penalty != 1.0:
        # As transformers: each token seen anywhere, once; positive logits shrink, negative ones grow.
        seen = torch.tensor(sorted({*prompt, *generated}), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * param.repetition_penalty, scores / param.repetition_penalty)
    if generated and (param.presence_penalty or param.frequency_penalty):
        counts = Counter(generated)
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= param.presence_penalty + param.frequency_penalty * times
    if param.logit_bias:
        ids = torch.tensor(list(param.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(param.logit_bias.values()), dtype=row.dtype, device=row.device)


def _draw(row: Tensor, param: SamplingParams, position: int) -> int:
    """Inverse-transform sampling over the sorted, truncated distribution, in float64: one random number a token."""
    # Largest first set to 0: however small the temperature, nothing but -inf can come of the division.
    scaled = (row.double() - row.max().double()) / param.temperature
    probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if param.top_k:
        keep[param.top_k :] = False
    if param.min_p:
        keep &= probabilities >= param.min_p * probabilities[0]
    if param.top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities
        keep &= before < param.top_p
    keep[0] = True
    cumulative = torch.where(keep, probabilities, 0.0).cumsum(0)
    if param.seed is None:
        raise ValueError("a sampled request must carry a seed")
    target = uniform(param.seed, param.sample_index, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=cumulative.dtype), right=True))
    last_kept = int(keep.nonzero()[-1])
    return int(order[min(index, last_kept)])
