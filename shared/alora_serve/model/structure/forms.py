"""Forms as llguidance's grammars, and its complaints as ours: which field, and which part of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from llguidance import LLMatcher

from alora_serve.errors import InvalidRequestError
from alora_serve.model.structure.schemas import check_schema, narrow_schema, schemas_in
from alora_serve.types import Choice, Grammar, JsonSchema, Regex, StructuredOutput

FIELD: Final = "sampling.structured_output"
MAX_COMPLAINT_CHARACTERS: Final = 500

_UNIMPLEMENTED: Final = re.compile(r"Unimplemented keys: (\[.*\])")


def field_of(form: StructuredOutput) -> str:
    """Path of the form in its request."""
    names = {JsonSchema: "json_schema", Regex: "regex", Grammar: "grammar", Choice: "choice.values"}
    return f"{FIELD}.{names[type(form)]}"


def grammar_of(form: StructuredOutput) -> str:
    """The form in llguidance's own language.

    Raises:
        InvalidRequestError: a JSON schema that asks for what cannot be held to.
    """
    match form:
        case JsonSchema(schema):
            return _json_grammar(schema, field_of(form))
        case Regex(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case Grammar(grammar):
            return LLMatcher.grammar_from_lark(grammar)
        case Choice(values):
            return LLMatcher.grammar_from_regex("|".join(map(_literally, values)))


def complaint(form: StructuredOutput, message: str) -> InvalidRequestError:
    """What llguidance says about a form, as an error of the field."""
    unimplemented = _UNIMPLEMENTED.search(message)
    if unimplemented and isinstance(form, JsonSchema):
        places = _places(json.loads(form.schema), set(json.loads(unimplemented[1])))
        description = "; ".join(f"{keyword!r} at {path} is not supported" for path, keyword in places) or message
    elif "coerce_one_of" in message:
        description = "'oneOf' is supported only where no value fits two of its schemas; use 'anyOf'"
    else:
        description = " ".join(message.replace("<non-verbose/>", "").split())
    return InvalidRequestError.of(field_of(form), description[:MAX_COMPLAINT_CHARACTERS])


def _json_grammar(schema: str, field: str) -> str:
    document = json.loads(schema)
    check_schema(document, field)
    narrow_schema(document, field)
    try:
        # Overrides win over what a schema says in "x-guidance": it may not switch off what would refuse it.
        return LLMatcher.grammar_from_json_schema(
            "{}" if document is True else json.dumps(document),
            overrides={
                # Left free, a small model may write white space until its tokens are used up.
                "whitespace_flexible": True,
                "whitespace_pattern": " ?",
                "item_separator": ",",
                "key_separator": ":",
                "lenient": False,
                "coerce_one_of": False,
                # No \uXXXX: a key spelt with one would be a declared one in disguise.
                "json_allowed_escapes": '"\\bfnrt',
            },
        )
    except ValueError as error:  # what Python's parser takes and others do not, such as half a character
        raise InvalidRequestError.of(field, f"is not JSON: {error}") from error


def _literally(text: str) -> str:
    """A regular expression of the text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _places(schema: Any, keywords: set[str]) -> Iterator[tuple[str, str]]:
    """Where the keywords stand in a schema."""
    for path, inner in schemas_in(schema):
        for keyword in sorted(keywords & inner.keys()):
            yield path or "/", keyword
