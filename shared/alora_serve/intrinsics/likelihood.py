"""The ``likelihood`` transformation: a category becomes the value expected over what the model could have said."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from alora_serve.errors import IntrinsicOutputError
from alora_serve.intrinsics.answer import Answer
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.intrinsics.json_paths import Json, Path, Pattern, literal_start, pointer, replaced, value_at


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Replaces a category by the mean of all categories' values, weighed by how likely each was.

    A category counts as what would have followed where its first token was among the most likely ones in the place of
    the answer's. Tokens that begin no category count nothing; one that begins several counts for the first.

    Attributes:
        input_path: where the categories stand.
        categories: value of each category, by its spelling in the answer, without quotation marks.
    """

    yaml_name: ClassVar[str] = "likelihood"

    input_path: Pattern
    categories: Mapping[str, float]

    def apply(self, document: Json, path: Path, answer: Answer) -> Json:
        """``document`` with a number at ``path``."""
        shares = self.shares(path, answer, expected=value_at(document, path))
        mean = sum(share * self.categories[category] for category, share in shares.items())
        return replaced(document, path, lambda _: mean)

    def shares(self, path: Path, answer: Answer, *, expected: Json) -> dict[str, float]:
        """How likely each category was, of those that the most likely tokens begin: adds up to 1, or is empty.

        Raises:
            IntrinsicOutputError: the answer has no category there, or ``expected`` is not the answer's own any more.
        """
        start = literal_start(answer.text, path)
        literal = value_at(answer.parsed(), path)
        if isinstance(literal, dict | list) or literal != expected or type(literal) is not type(expected):
            raise IntrinsicOutputError(
                f"likelihood at {excerpt(pointer(path))} weighs the model's own words, but finds {excerpt(expected)} "
                f"where it said {excerpt(literal)}; put it before transformations that change this value"
            )
        spelling = literal if isinstance(literal, str) else json.dumps(literal)
        token, before = answer.token_at(start + isinstance(literal, str))
        if before and token.content.endswith(json.dumps(literal).encode()):
            return {spelling: 1.0} if spelling in self.categories else {}  # said as a whole: nothing to weigh it with
        weights: dict[str, float] = {}
        if spelling in self.categories:
            weights[spelling] = math.exp(token.logprob)
        for content, logprob in token.alternatives:
            begun = content[before:]
            if content == token.content or not begun or content[:before] != token.content[:before]:
                continue
            category = next((name for name in self.categories if name.encode().startswith(begun)), None)
            if category is not None:
                weights[category] = weights.get(category, 0.0) + math.exp(logprob)
        total = sum(weights.values())
        return {category: weight / total for category, weight in weights.items()} if total else {}
