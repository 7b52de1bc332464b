"""One question of a test set and what came of it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Form = Literal["label", "text", "none"]
"""What an answer is; none where it could not be read as what was asked for."""


@dataclass(frozen=True, slots=True)
class Item:
    """An answered row.

    Attributes:
        item_id: of the row; pairs items of two evaluations.
        source: where the row comes from; may be empty.
        target: the right answer.
        prediction: the answer: a label, or text. What is no label counts as wrong.
        probabilities: of each label, as far as known; empty for free text.
        seconds: the call took, as the router measured.
        first_token_seconds: until the first token.
        prompt_tokens, cached_tokens, generated_tokens: of the call.
        form: of the answer. Of one that has none, time and tokens are not known, and it is wrong.
    """

    item_id: str
    source: str
    target: str
    prediction: str
    probabilities: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    form: Form = "label"

    @property
    def is_right(self) -> bool:
        """The prediction is the target."""
        return self.prediction == self.target

    @property
    def confidence(self) -> float:
        """Probability of the prediction, by the model; 1 where it is not known."""
        return self.probabilities.get(self.prediction, 0.0) if self.probabilities else 1.0
