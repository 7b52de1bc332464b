"""Recipes are read closed-world; flags override the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_serve.errors import ConfigError
from alora_serve.training.recipe import load_recipe


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "checks.toml"
    path.write_text('labels = ["yes", "no"]\nlikelihood = { yes = 1.0, no = 0.0 }\ninvocation = "<|check|>"\n')
    return path


def test_flags_override_the_file(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, {"rank": 4, "epochs": None, "seed": 7})
    assert (recipe.name, recipe.rank, recipe.epochs, recipe.seed) == ("checks", 4, 2, 7)
    assert recipe.invocation == "<|check|>"


def test_the_twin_of_an_alora_has_no_invocation(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, {"kind": "lora"}).invocation is None


def test_what_is_otherwise_for_the_twin_stands_in_a_table_and_flags_override_it(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "\nepochs = 4\n[lora]\nepochs = 3\n")
    assert load_recipe(recipe_file, {}).epochs == 4
    assert load_recipe(recipe_file, {"kind": "lora"}).epochs == 3
    assert load_recipe(recipe_file, {"kind": "lora", "epochs": 1}).epochs == 1
    recipe_file.write_text(recipe_file.read_text().replace("epochs = 3", "epoch = 3"))
    for kind in ("alora", "lora"):
        with pytest.raises(ConfigError, match="epoch"):
            load_recipe(recipe_file, {"kind": kind})
    recipe_file.write_text("lora = 3\n")
    with pytest.raises(ConfigError, match=r"should be a table, \[lora\]"):
        load_recipe(recipe_file, {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rnak = 4", "rnak"),
        ("rank = 0", "rank"),
        ('labels = ["yes"]', "at least two"),
        ('labels = ["yes", "no"]\nlikelihood = { yes = 1.0 }', "likelihood"),
        ('kind = "dora"', "kind"),
        ("rank = ", "cannot read"),
    ],
)
def test_what_makes_no_sense_is_named(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_recipe(path, {})
