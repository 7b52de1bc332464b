"""A public system prompt is what its conversations begin with, and not a token more."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from alora_serve.engine.public_prompts import read_public_prompts
from alora_serve.errors import ConfigError
from alora_serve.model.loader import BaseModel
from alora_serve.types import ChatMessage


def test_every_conversation_with_the_prompt_begins_with_its_tokens(model: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(yaml.safe_dump(["You are a helpful assistant.", "You are terse."]))
    prompts = read_public_prompts(path, model.tokenizer)
    assert len(set(prompts)) == 2
    for text, beginning in zip(("You are a helpful assistant.", "You are terse."), prompts, strict=True):
        for user in ("Hi", "1 + 1", ""):
            turns = (ChatMessage("system", text), ChatMessage("user", user))
            tokens = model.tokenizer.render(turns).prefix_tokens
            assert tokens[: len(beginning)] == beginning
        assert len(beginning) > 3


def test_without_a_file_nothing_is_public_and_another_file_is_refused(model: BaseModel, tmp_path: Path) -> None:
    assert read_public_prompts(None, model.tokenizer) == ()
    path = tmp_path / "prompts.yaml"
    for content in ("a: b", "[1]", "- [", ""):
        path.write_text(content)
        with pytest.raises(ConfigError, match="public_prompts_file"):
            read_public_prompts(path, model.tokenizer)
