"""One evaluation through a server, from whom to ask to what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from alora_serve.client import Client
from alora_serve.errors import ConfigError
from alora_serve.evaluation.asking import Asker, DefinedAsker, IntrinsicAsker, ask_all, labels_of
from alora_serve.evaluation.items import Item
from alora_serve.evaluation.report import Evaluation
from alora_serve.intrinsics import parse_definition
from alora_serve.training.definition import io_yaml
from alora_serve.training.recipe import Recipe, load_recipe
from alora_serve.training.rows import Row

_TEXT_TOKENS: Final = 256
"""Most tokens of a free text for which no definition sets a bound; labels end by their form."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is asked, and by whose definition.

    Attributes:
        adapter: empty for the base model.
        recipe: defines the question; None where the server's definition does.
        parameters: what the instruction of the server's definition names.
    """

    adapter: str
    recipe: Recipe | None
    parameters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: str, recipe_file: Path | None, instruction: str | None, parameters: Mapping[str, str]) -> Self:
        """From what a person gives.

        Raises:
            ConfigError: the base model is to be asked something that nothing defines, or a parameter has no place.
        """
        if recipe_file is None:
            if not adapter:
                raise ConfigError("the base model has no io.yaml: say with --recipe and --instruction what to ask it")
            if instruction is not None:
                raise ConfigError(f"--instruction would replace the one in the io.yaml of {adapter}: give --recipe too")
            return cls(adapter, None, parameters)
        if parameters:
            raise ConfigError("--parameter is for the instruction of an io.yaml: a recipe's is asked as it stands")
        recipe = load_recipe(recipe_file, {"instruction": instruction})
        if not adapter and recipe.instruction is None:
            raise ConfigError("the base model knows no invocation: put the question in words, with --instruction")
        return cls(adapter, recipe)

    def asker(self, client: Client) -> Asker:
        """What asks it."""
        if self.recipe is None:
            return IntrinsicAsker(client, self.adapter, self.parameters)
        definition = parse_definition(io_yaml(self.recipe, _TEXT_TOKENS).encode())
        takes_documents = client.get_model().takes_documents
        return DefinedAsker(client, self.adapter, definition, template_takes_documents=takes_documents)


def evaluate(
    client: Client, subject: Subject, rows: Sequence[Row], together: int, on_answer: Callable[[Item], None]
) -> Evaluation:
    """Ask every row and gather the answers; ``on_answer`` is called as they come, from other threads.

    Raises:
        AloraServeError: a row could not be asked.
    """
    items = ask_all(subject.asker(client), rows, together, on_answer)
    return Evaluation(subject.adapter, subject.recipe.labels if subject.recipe else labels_of(items), items)
