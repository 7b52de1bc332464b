"""The model card of a trained adapter. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alora_serve.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to.

    Attributes:
        base_name: the base model, as the adapter's config names it.
        files: names of the data files.
        rows: training rows; ``validation_rows`` were held out of the same files, and ``too_long`` were left out, since
            their prompts have more than the recipe's ``max_tokens``.
        steps: of the optimiser.
        cpu_seconds: of all processes that worked on it.
        threads: torch's, in each.
        dtype: the base model's, as computed.
        validation: one entry for each epoch, of the adapter in float32, as it is trained.
    """

    base_name: str
    files: Sequence[str]
    rows: int
    validation_rows: int
    too_long: int
    steps: int
    cpu_seconds: float
    threads: int
    dtype: str
    validation: Sequence[Mapping[str, float]]


def model_card(recipe: Recipe, trained: Trained, invocation_text: str, majority: float | None) -> str:
    """README.md of the adapter.

    Args:
        recipe: what was trained.
        trained: how it went.
        invocation_text: its invocation tokens spelt out; empty for a plain LoRA.
        majority: share of the most frequent label among validation rows; None for free text.
    """
    left_out = f", {trained.too_long} left out as too long" if trained.too_long else ""
    article = "An Activated LoRA (aLoRA)" if recipe.kind == "alora" else "A plain LoRA"
    rows = {
        "invocation": _code(invocation_text) if invocation_text else "",
        "answer": _answer(recipe),
        "rank, alpha, targets": f"{recipe.rank}, {recipe.alpha}, {', '.join(recipe.targets)}",
        "rows": (
            f"{trained.rows} to train, {trained.validation_rows} to validate{left_out} ({', '.join(trained.files)})"
        ),
        "steps": f"{trained.steps} of {recipe.batch_size} rows, {recipe.epochs} epochs",
        "optimiser": (
            f"AdamW, learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, "
            f"dropout {recipe.dropout:g}, seed {recipe.seed}"
        ),
        "cost": f"{trained.cpu_seconds:.0f} CPU-seconds, {trained.threads} thread(s), base in {trained.dtype}",
        "validation after each epoch": "; ".join(_epoch(epoch) for epoch in trained.validation) or "none kept",
        "most frequent label, of validation rows": f"{majority:.1%}" if majority is not None else "",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    about = f"{recipe.about}\n\n" if recipe.about else ""
    note = f"{recipe.note.strip()}\n\n" if recipe.note else ""
    return (
        f"# {recipe.name}\n\n{article} adapter for {trained.base_name}.\n\n{about}{note}"
        f"`io.yaml` says how it is asked and how its answer is read.\n\n"
        f"## Training\n\n| | |\n|---|---|\n{table}\n"
        "The loss covers the answer and its end of turn only.\n"
    )


def _answer(recipe: Recipe) -> str:
    if not recipe.labels:
        return f"JSON object with {_code(recipe.field)}"
    return "one of " + ", ".join(_code(f'"{label}"') for label in recipe.labels)


def _code(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("|", r"\|")  # a bare bar ends the cell, even inside code
    return f"`{shown}`"


def _epoch(measured: Mapping[str, float]) -> str:
    shown = [f"loss {measured['loss']:.3f}"]
    if "accuracy" in measured:
        shown.append(f"accuracy {measured['accuracy']:.1%}")
    return ", ".join(shown)
