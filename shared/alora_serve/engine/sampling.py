"""Choosing the next token. Random numbers are keyed by seed, sample index and position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from alora_serve.engine.penalties import History, penalize
from alora_serve.types import SamplingParams

SHORTLIST: Final = 256
"""Likeliest tokens that are sorted for a truncation; all are only where it keeps more."""

_NONE: Final = -1


def uniform(seed: int, sample_index: int, position: int) -> float:
    """The random number in [0, 1) of one draw: Philox keyed by seed and sample index, counted by position."""
    # Typed: numpy makes floats of a list that holds numbers on both sides of 2**63, and seeds would run together.
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, sample_index], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(np.random.Generator(generator).random())


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token.

    Attributes:
        logprob: its natural-log probability in the unmodified distribution; None where not asked for.
        top: the most likely tokens of that distribution and their log-probabilities, likeliest first, of equally likely
            ones the lower id; empty where not asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[History],
    positions: Sequence[int],
    masks: Sequence[bytes | None] = (),
) -> list[Chosen | None]:
    """The next token of each row; None where there is none to choose, since the largest of its logits is not finite.

    Args:
        logits: ``[rows, vocabulary]`` float32; changed in place.
        params: of each row; ``seed`` is set where ``temperature`` is not 0.
        histories: of each row; made with its ``params``.
        positions: of each row, how many tokens have been generated: the position of the draw.
        masks: of each row, a bit for each token id, little-endian, at least one of them set: whether it may be chosen;
            None where every token may. Empty: so it is everywhere.
    """
    asking = [row for row, param in enumerate(params) if param.logprobs]
    raw = torch.log_softmax(logits if len(asking) == len(params) else logits[asking], dim=-1) if asking else None
    _forbid(logits, masks)
    penalize(logits, histories)
    likeliest = logits.argmax(dim=-1, keepdim=True)  # of a row with NaN, that
    tokens = torch.where(logits.gather(1, likeliest).isfinite(), likeliest, _NONE).flatten().tolist()
    drawing = [row for row, param in enumerate(params) if param.temperature > 0.0 and tokens[row] != _NONE]
    if drawing:
        rows = logits if len(drawing) == len(params) else logits[drawing]
        drawn = _draw(rows, [params[row] for row in drawing], [positions[row] for row in drawing])
        for row, token in zip(drawing, drawn, strict=True):
            tokens[row] = token
    chosen = [None if token == _NONE else Chosen(token) for token in tokens]
    if raw is not None:
        ids = torch.tensor([[max(tokens[row], 0)] for row in asking], device=raw.device)
        of_chosen = raw.gather(1, ids).flatten().tolist()
        top = _likeliest(raw, [params[row].top_logprobs for row in asking])
        for row, logprob, its in zip(asking, of_chosen, top, strict=True):
            if chosen[row] is not None:
                chosen[row] = Chosen(tokens[row], logprob, its)
    return chosen


def _forbid(logits: Tensor, masks: Sequence[bytes | None]) -> None:
    """What may not be chosen becomes impossible, whatever is added to it."""
    bound = [(row, mask) for row, mask in enumerate(masks) if mask is not None]
    if not bound:
        return
    packed = torch.frombuffer(bytearray(b"".join(mask for _, mask in bound)), dtype=torch.uint8).to(logits.device)
    places = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed.view(len(bound), -1, 1) >> places) & 1).bool().flatten(1)[:, : logits.shape[-1]]
    if len(bound) == len(logits):
        logits.masked_fill_(~allowed, -math.inf)
    else:
        rows = torch.tensor([row for row, _ in bound], device=logits.device)
        logits[rows] = logits[rows].masked_fill_(~allowed, -math.inf)


_Ranked = tuple[tuple[int, float], ...]


def _likeliest(logprobs: Tensor, counts: Sequence[int]) -> list[_Ranked]:
    """So many of the most likely tokens of each row; equally likely ones in the order of their ids, cut off as well."""
    vocabulary = logprobs.shape[-1]
    most = min(max(counts), vocabulary)
    if not most:
        return [()] * len(counts)
    # One more than wanted: whether it is as likely as the last wanted, so that another may have to stand there.
    values, ids = logprobs.topk(min(most + 1, vocabulary), dim=-1)
    return [
        _likeliest_of(logprobs[row], count)
        if 0 < count < len(its) and not its[count - 1] > its[count]
        else _in_order(tokens, its)[:count]
        for row, (tokens, its, count) in enumerate(zip(ids.tolist(), values.tolist(), counts, strict=True))
    ]


def _likeliest_of(logprobs: Tensor, count: int) -> _Ranked:
    """Of one row, all that are as likely as the last wanted being looked at."""
    ids = (logprobs >= logprobs.topk(count).values[-1]).nonzero().flatten()
    return _in_order(ids.tolist(), logprobs[ids].tolist())[:count]


def _in_order(ids: Sequence[int], logprobs: Sequence[float]) -> _Ranked:
    return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda ranked: (-ranked[1], ranked[0])))


def _draw(rows: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Inverse-transform sampling in float64: one random number a token.

    Probabilities are summed in the order of token ids. In the order of likelihood two tokens that are nearly equally
    likely change places by rounding, and a stream taken up elsewhere would draw the other one.
    """
    temperatures = torch.tensor([[param.temperature] for param in params], dtype=torch.float64, device=rows.device)
    # Largest first set to 0: however small the temperature, nothing but -inf can come of the division.
    scaled = (rows.double() - rows.max(dim=-1, keepdim=True).values.double()) / temperatures
    probabilities = torch.softmax(scaled, dim=-1)
    truncated = [row for row, param in enumerate(params) if param.top_k or param.min_p > 0.0 or param.top_p < 1.0]
    if truncated:
        probabilities[truncated] = _truncate(probabilities[truncated], [params[row] for row in truncated])
    mass = probabilities.cumsum(dim=-1)
    total = mass[:, -1:]
    draws = [[_uniform_of(param, position)] for param, position in zip(params, positions, strict=True)]
    drawn = torch.tensor(draws, dtype=torch.float64, device=rows.device) * total
    # Below the sum, whatever rounding made of the product: so the token found has a part in it.
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    return [int(token) for token in torch.searchsorted(mass, drawn, right=True).flatten().tolist()]


def _truncate(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """``[rows, vocabulary]`` probabilities, 0 where a token is not among the likeliest that each row's rules keep."""
    vocabulary = probabilities.shape[-1]
    count = min(SHORTLIST, vocabulary)
    # By id, so that equally likely tokens come in the same order however many candidates there are.
    ids = probabilities.topk(count, dim=-1).indices.sort(dim=-1).values
    kept, is_known = _kept(probabilities.gather(1, ids), params)
    result = torch.zeros_like(probabilities).scatter_(1, ids, kept)
    if count < vocabulary and not bool(is_known.all()):
        more = (~is_known).nonzero().flatten().tolist()
        result[more], _ = _kept(probabilities[more], [params[row] for row in more])
    return result


def _kept(candidates: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Which of a row's likeliest tokens its rules keep.

    Args:
        candidates: ``[rows, count]`` float64 probabilities, in the order of their ids.
        params: of each row.

    Returns:
        The candidates with 0 for those not kept; and ``[rows]`` bool, whether the last kept is likelier than the last
        candidate, so that nothing else can be kept as well.
    """
    device, count = candidates.device, candidates.shape[-1]
    limits = torch.tensor(
        [[param.top_k or math.inf, param.min_p, param.top_p] for param in params], dtype=torch.float64, device=device
    )
    top_k, min_p, top_p = limits.unsqueeze(-1).unbind(1)
    ranked, order = candidates.sort(dim=-1, descending=True, stable=True)
    mass = ranked.cumsum(-1)
    keep = (torch.arange(count, device=device) < top_k) & (ranked >= min_p * ranked[:, :1])
    # All of it is kept where top_p is 1, whatever rounding made of the sum.
    keep &= (mass - ranked < top_p) | (top_p >= 1.0)
    keep[:, 0] = True  # each rule keeps the likeliest so many, and one at least
    last = keep.sum(dim=-1, keepdim=True) - 1
    is_known = (ranked.gather(1, last) > ranked[:, -1:]).squeeze(-1)
    return torch.zeros_like(candidates).scatter_(1, order, ranked * keep), is_known


def _uniform_of(param: SamplingParams, position: int) -> float:
    if param.seed is None:
        raise ValueError("a sampled request must carry a seed")
    return uniform(param.seed, param.sample_index, position)
