"""Real text cut to a number of tokens: the unit in which the figures are given."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from alora_serve.types import ChatMessage, TokenIds

Count = Callable[[Sequence[ChatMessage]], TokenIds]
"""Tokens of a rendered conversation, generation prompt left out."""


def conversation(data: Path, tokens: int, *, seed: int, count: Count) -> tuple[ChatMessage, ...]:
    """A conversation of at most ``tokens`` tokens and at least 95 % of them, another one for each seed.

    Args:
        data: JSONL rows with ``messages``; their texts, shuffled, make a list that the user asks about.
        count: renders and tokenizes.
    """
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    benign = [row["messages"][-1]["content"] for row in rows if row["target"] == "no"]
    random.Random(seed).shuffle(benign)
    low, high = 1, len(benign)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(count(_ask(benign[:middle]))) <= tokens else (low, middle - 1)
    chosen = benign[:low]
    filler = " ".join(benign[low : low + 4]).split()
    while filler and len(count(_ask([*chosen, " ".join(filler)]))) > tokens:
        filler.pop()
    return _ask([*chosen, " ".join(filler)])


def _ask(texts: Sequence[str]) -> tuple[ChatMessage, ...]:
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
    return (ChatMessage("user", f"Here are requests that people sent us.\n{listed}\nWhich of them is about history?"),)
