"""Scores tokens that are given: the model runs them as a prefill's, and says how likely it thought each of them.

::

    [0, base_until)                       base KV, shared with everybody
    [base_until, prompt_len)              the rest of the prompt, in the private tail: at least its last token, whose
                                          row says how likely the first given token is
    [prompt_len, prompt_len + given - 1)  the given tokens, likewise; of the last one nobody asks what follows
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor

from alora_serve.engine.batch import Batch
from alora_serve.engine.events import TokensScored
from alora_serve.engine.sequence import Sequence
from alora_serve.engine.sequence_request import SequenceRequest
from alora_serve.model.step import Span
from alora_serve.types import TokenIds


@dataclass(frozen=True, slots=True)
class ScoringRequest(SequenceRequest):
    """A sequence that generates nothing: its ``prompt`` is a prompt and then all of the given tokens but the last.

    Attributes:
        given: the tokens; each is predicted by the row before it.
    """

    given: TokenIds = ()

    @property
    def first_row(self) -> int:
        """Position of the row that predicts the first given token."""
        return len(self.prompt) - len(self.given)


def wanted_rows(sequence: Sequence, span: Span) -> int:
    """Of how many of a span's last tokens the logits are wanted."""
    request = sequence.request
    if isinstance(request, ScoringRequest):
        return max(0, span.end - max(span.start, request.first_row))
    return int(request.sampling is not None and span.end == sequence.known_tokens)


def tell_scores(batch: Batch, wanted: Listed[int], logits: Tensor) -> tuple[Tensor | None, list[Sequence]]:
    """Tell those whose tokens are given how likely these were; of one that is impossible, ``-inf``.

    Args:
        batch: as it ran.
        wanted: rows of each span.
        logits: ``[sum of wanted, vocabulary]`` float32.

    Returns:
        The rows of all others, in order, None if there are none; and those who were told nothing, as there is a row in
        which no token has a probability: its largest logit is not finite.
    """
    if not any(isinstance(sequence.request, ScoringRequest) for sequence, _ in batch):
        return logits, []
    others: list[int] = []
    untold: list[Sequence] = []
    first = 0
    for (sequence, span), rows in zip(batch, wanted, strict=True):
        request = sequence.request
        if not isinstance(request, ScoringRequest):
            others += range(first, first + rows)
        elif rows:
            start = span.end - rows - request.first_row
            given = torch.tensor(request.given[start : start + rows], device=logits.device)
            logprobs = torch.log_softmax(logits[first : first + rows], dim=-1).gather(1, given.unsqueeze(1))
            scores: list[float] = logprobs.flatten().tolist()
            if any(map(isnan, scores)):
                untold.append(sequence)
            else:
                sequence.sink(TokensScored(tuple(scores)))
        first += rows
    return logits[others] if others else None, untold
