"""System prompts that an operator declares to be no secret, as the tokens that conversations with one begin with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from alora_serve.errors import ConfigError
from alora_serve.model.chat import ChatTokenizer
from alora_serve.safe_yaml import load_yaml
from alora_serve.types import ChatMessage, TokenIds

_strings: TypeAdapter[list[str]] = TypeAdapter(list[str])
_ANY_USER = ("a", "1")
"""Two turns that differ from their first character on."""


def read_public_prompts(path: Path | None, tokenizer: ChatTokenizer) -> tuple[TokenIds, ...]:
    """The prompts of a YAML list of strings; none without a file.

    Raises:
        ConfigError: it cannot be read, or is no such list.
    """
    if path is None:
        return ()
    try:
        prompts = _strings.validate_python(load_yaml(path.read_text()), strict=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"public_prompts_file {path}: is no YAML list of strings: {type(error).__name__}") from error
    return tuple(_beginning(prompt, tokenizer) for prompt in prompts)


def _beginning(prompt: str, tokenizer: ChatTokenizer) -> TokenIds:
    """What conversations with this system prompt have in common, whatever is said in them."""
    first, second = (_conversation(prompt, user, tokenizer) for user in _ANY_USER)
    common = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return tuple(token for token, _ in common)


def _conversation(prompt: str, user: str, tokenizer: ChatTokenizer) -> Sequence[int]:
    return tokenizer.render((ChatMessage("system", prompt), ChatMessage("user", user))).prefix_tokens
