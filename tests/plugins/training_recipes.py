"""A recipe that a model of a few kilobytes can learn, and nobody who watches."""

from __future__ import annotations

import pytest

from alora_serve.training.recipe import Recipe

INVOCATION = "<|im_start|>question<|im_end|>"
KINDS = ("alora", "lora")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def make_recipe(kind: str = "alora", **changes: object) -> Recipe:
    """Answers ``yes`` or ``no``; ``changes`` are fields of the recipe."""
    fields: dict[str, object] = {
        "name": "question",
        "kind": kind,
        "invocation": INVOCATION if kind == "alora" else None,
        "labels": ("yes", "no"),
        "likelihood": {"yes": 1.0, "no": 0.0},
        "field": "yes_likelihood",
        "rank": 4,
        "learning_rate": 2e-2,
        "weight_decay": 0.0,
    }
    if "labels" in changes and "likelihood" not in changes:
        fields["likelihood"] = {}
    return Recipe.model_validate({**fields, **changes})


class SilentView:
    """Notes what a training tells, and interrupts it where wanted."""

    def __init__(self, stop_at: int = 0) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self.stop_at = stop_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, total_steps: int, loss: float) -> None:
        self.steps.append(step)
        if step == self.stop_at:
            raise KeyboardInterrupt
