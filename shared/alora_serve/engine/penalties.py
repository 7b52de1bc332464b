"""Penalties on tokens that were there before, and biases, for the rows of a batch at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from alora_serve.types import SamplingParams

FIRST_ROOM = 64
"""Tokens that a list has room for at first."""


class _Tokens:
    """Different token ids, each with a number. Grows in place: a step adds one, and reads all."""

    def __init__(self, counts: dict[int, float]) -> None:
        self._places = {token: place for place, token in enumerate(counts)}
        room = max(FIRST_ROOM, 2 * len(counts))
        self._ids = torch.zeros(room, dtype=torch.long)
        self._numbers = torch.zeros(room, dtype=torch.float32)
        self._ids[: len(counts)] = torch.tensor(list(counts), dtype=torch.long)
        self._numbers[: len(counts)] = torch.tensor(list(counts.values()), dtype=torch.float32)

    @property
    def ids(self) -> Tensor:
        """``[tokens]``."""
        return self._ids[: len(self._places)]

    @property
    def numbers(self) -> Tensor:
        """``[tokens]`` float32."""
        return self._numbers[: len(self._places)]

    def count(self, token: int) -> None:
        """One more of a token."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._numbers = (torch.cat([old, torch.zeros_like(old)]) for old in (self._ids, self._numbers))
        self._ids[place] = token
        self._numbers[place] += 1


class History:
    """What penalties and biases of one sequence need of its tokens: nothing where it has neither. A function of them.

    Args:
        params: of the sequence.
        prompt: its prompt's tokens, which the repetition penalty counts as well.
        generated: those generated so far.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int] = ()) -> None:
        self.params = params
        self.seen = _Tokens(dict.fromkeys((*prompt, *generated), 1.0)) if params.repetition_penalty != 1.0 else None
        self.generated: _Tokens | None = None
        if params.presence_penalty or params.frequency_penalty:
            self.generated = _Tokens({})
            for token in generated:
                self.generated.count(token)
        self.biases = _Tokens(dict(params.logit_bias)) if params.logit_bias else None

    def push(self, token: int) -> None:
        """One more generated token."""
        for tokens in (self.seen, self.generated):
            if tokens is not None:
                tokens.count(token)


def penalize(logits: Tensor, histories: Sequence[History]) -> None:
    """Apply each row's penalties and biases, in place.

    Args:
        logits: ``[rows, vocabulary]`` float32.
        histories: of each row.
    """
    repeated: defaultdict[float, list[tuple[int, _Tokens]]] = defaultdict(list)
    counted: list[tuple[int, _Tokens]] = []
    biased: list[tuple[int, _Tokens]] = []
    for row, history in enumerate(histories):
        if history.seen is not None:
            repeated[history.params.repetition_penalty].append((row, history.seen))
        if history.generated is not None:
            counted.append((row, history.generated))
        if history.biases is not None:
            biased.append((row, history.biases))
    # As transformers: each token seen anywhere, once; positive logits shrink, negative ones grow. By a number, not a
    # tensor of them, which a GPU divides by in another way.
    for penalty, listed in repeated.items():
        places, _ = _places(logits, listed)
        scores = logits[places]
        logits[places] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if counted:
        places, times = _places(logits, counted)
        rows = places[0]
        presence, frequency = torch.tensor(
            [[history.params.presence_penalty, history.params.frequency_penalty] for history in histories],
            dtype=logits.dtype,
            device=logits.device,
        ).unbind(1)
        logits[places] -= presence[rows] + frequency[rows] * times
    if biased:
        places, numbers = _places(logits, biased)
        logits[places] += numbers


def _places(logits: Tensor, listed: Sequence[tuple[int, _Tokens]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Row and token id of all, and their numbers."""
    rows = torch.tensor([row for row, _ in listed])
    ids = [tokens.ids for _, tokens in listed]
    rows = rows.repeat_interleave(torch.tensor([len(row_ids) for row_ids in ids]))
    numbers = torch.cat([tokens.numbers for _, tokens in listed])
    return (rows.to(logits.device), torch.cat(ids).to(logits.device)), numbers.to(logits.device)
