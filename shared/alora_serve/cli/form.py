"""The form of an answer, from options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alora_serve.errors import InvalidRequestError
from alora_serve.types import Choice, Grammar, JsonSchema, Regex, StructuredOutput

FIELD = "sampling.structured_output"


def read_form(
    json_schema: str | None = None,
    regex: str | None = None,
    choice: Sequence[str] = (),
    grammar: str | None = None,
) -> StructuredOutput | None:
    """The one form that options name; None where they name none. Schema and grammar may be the names of files.

    Raises:
        InvalidRequestError: they name more than one, or a file that cannot be read.
    """
    forms: list[StructuredOutput] = []
    if json_schema is not None:
        forms.append(JsonSchema(_text_of(json_schema)))
    if regex is not None:
        forms.append(Regex(regex))
    if choice:
        forms.append(Choice(tuple(choice)))
    if grammar is not None:
        forms.append(Grammar(_text_of(grammar)))
    if len(forms) > 1:
        raise InvalidRequestError.of(FIELD, "give one of --json-schema, --regex, --choice and --grammar")
    return forms[0] if forms else None


def _text_of(given: str) -> str:
    """The text, or that of the file that it names. No schema and no grammar is a name of one word."""
    if any(character in given for character in "{:\n") and not Path(given).is_file():
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError.of(FIELD, f"{given} cannot be read: {error}") from error
