"""What an intrinsic answers: the JSON it is trained to write, and the ``io.yaml`` by which it is served. Torch-free."""

from __future__ import annotations

import json
from typing import Any, Final

import yaml

from alora_serve.errors import ConfigError
from alora_serve.training.recipe import Recipe

_SPARE_TOKENS: Final = 8
_FREE_TEXT_TOKENS: Final = 256
"""At least, for free text: a longer question is rewritten at greater length than any that was trained on."""


def answer_text(recipe: Recipe, target: str) -> str:
    """The answer as the adapter writes it: a JSON string for a label, an object with one field for free text.

    Raises:
        ConfigError: the recipe has labels, and the target is none of them.
    """
    if not recipe.labels:
        return json.dumps({recipe.field: target}, ensure_ascii=False)
    if target not in recipe.labels:
        raise ConfigError(f"target {target!r} is none of the labels {list(recipe.labels)}")
    return json.dumps(target, ensure_ascii=False)


def response_format(recipe: Recipe) -> dict[str, Any]:
    """The JSON schema of every answer."""
    if recipe.labels:
        return {"type": "string", "enum": list(recipe.labels)}
    return {
        "type": "object",
        "properties": {recipe.field: {"type": "string"}},
        "required": [recipe.field],
        "additionalProperties": False,
    }


def io_yaml(recipe: Recipe, longest_answer_tokens: int) -> str:
    """The definition in the format of the Granite intrinsic libraries.

    Documents are left to the chat template or, where it has no place for them, to the server: it puts them where it
    puts those of a question to the base model, whose KV the adapter is to use.

    Args:
        recipe: what was trained.
        longest_answer_tokens: of all training answers, end of turn included.
    """
    transformations: list[dict[str, Any]] | None = None
    if recipe.likelihood:
        transformations = [
            {"type": "likelihood", "input_path": [], "categories_to_values": dict(recipe.likelihood)},
            {"type": "nest", "input_path": [], "field_name": recipe.field},
        ]
    elif recipe.labels:
        transformations = [{"type": "nest", "input_path": [], "field_name": recipe.field}]
    most_tokens = longest_answer_tokens + _SPARE_TOKENS
    fields: dict[str, Any] = {
        "model": None,
        "response_format": json.dumps(response_format(recipe), indent=2),
        "transformations": transformations,
        "instruction": recipe.instruction.replace("{", "{{").replace("}", "}}") if recipe.instruction else None,
        "docs_as_message": None,
        "parameters": {"max_completion_tokens": most_tokens if recipe.labels else max(most_tokens, _FREE_TEXT_TOKENS)},
        "sentence_boundaries": None,
    }
    return yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes long text as a block, as people would."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
