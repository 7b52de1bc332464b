"""What to train and how, as a small TOML file or flags. Torch-free."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alora_serve.errors import ConfigError

Kind = Literal["alora", "lora"]


class Recipe(BaseModel):
    """Everything but data, base model and seed's machine that decides the trained weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Of the intrinsic.")
    about: str = Field("", description="What it answers, in a sentence, for the model card.")
    data: str = Field("", description="Folder of the data, under the directory that --data names.")
    note: str = Field("", description="Markdown for the model card: sources, licences, intended use.")
    kind: Kind = "alora"
    invocation: str | None = Field(
        None, description="Text that switches an aLoRA on; unset, it is the chat template's generation prompt."
    )
    instruction: str | None = Field(
        None, description="Put after the conversation as it stands, as a turn of the user; braces name nothing."
    )
    labels: tuple[str, ...] = Field((), description="The possible answers; empty: the answer is free text.")
    likelihood: dict[str, float] = Field({}, description="Label to value: the result is the expected value.")
    field: str = Field("response", min_length=1, description="Name of the result's field.")
    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    epochs: int = Field(2, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0)
    validation_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    max_tokens: int = Field(1024, ge=8, description="Rows with longer prompts are left out of training.")
    limit: int | None = Field(
        None,
        ge=1,
        description="Train on the first rows only: those of the data that are not held out and not too long.",
    )
    seed: int = Field(0, ge=0, description="Of initialisation, order and dropout.")
    split_seed: int = Field(0, ge=0, description="Of the validation split; the same for all seeds.")

    @model_validator(mode="after")
    def _labels_agree(self) -> Self:
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError(f"labels must be at least two different ones, not {list(self.labels)}")
        if self.likelihood and set(self.likelihood) != set(self.labels):
            raise ValueError(f"likelihood must give each of the labels {list(self.labels)} a value")
        if self.kind == "lora" and self.invocation is not None:
            raise ValueError("a plain LoRA has no invocation")
        return self


def load_recipe(path: Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of a TOML file with ``overrides`` (None: not given) on top; without a file, of the overrides alone.

    A table ``[lora]`` of the file holds what is otherwise for the plain LoRA, the twin: it has no invocation.

    Raises:
        ConfigError: the file is missing or not TOML, or a field is unknown or out of range. Names it.
    """
    fields: dict[str, Any] = {}
    if path is not None:
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the recipe {path}: {error}") from error
        fields.setdefault("name", path.stem)
    given = {name: value for name, value in overrides.items() if value is not None}
    twin = fields.pop("lora", {})
    if not isinstance(twin, dict):
        raise ConfigError(f"the recipe {path} is not valid: lora: should be a table, [lora]")
    plain = {name: value for name, value in fields.items() if name != "invocation"} | twin | {"kind": "lora"}
    if twin:  # a mistake in it is found whichever of the two is trained
        _validated(plain, path)
    return _validated({**(plain if given.get("kind") == "lora" else fields), **given}, path)


def _validated(fields: Mapping[str, Any], path: Path | None) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"the recipe{f' {path}' if path else ''} is not valid: {problems}") from error
