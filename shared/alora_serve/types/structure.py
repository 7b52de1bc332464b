"""Forms that an answer may be bound to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON value of this schema, a JSON text; between its parts stand no line breaks and at most one space."""

    schema: str


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that this regular expression, in Rust's syntax, matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text of this context-free grammar, in Lark's syntax as llguidance takes it; ``start`` is its first rule.

    Or in llama.cpp's EBNF, whose rules are written with ``::=``; ``root`` is its first rule.
    """

    grammar: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Exactly one of these strings: at least one, none empty and no two the same."""

    values: tuple[str, ...]


StructuredOutput: TypeAlias = JsonSchema | Regex | Grammar | Choice
"""The form of an answer. One that finishes with ``stop`` has it as a whole."""
