"""Forms as llguidance's grammars, and its complaints as ours: which field, and which part of it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from llguidance import LLMatcher

from alora_serve.errors import InvalidRequestError
from alora_serve.model.structure.bounds import LARK_TEXT, MAX_OPTIONAL_PARTS, most_optional_parts, optional_parts
from alora_serve.model.structure.ebnf import is_ebnf, lark_of
from alora_serve.model.structure.places import UNSATISFIABLE, place_of_fault
from alora_serve.model.structure.schemas import CONTROL_CHARACTERS, check_schema, keyword_places, narrow_schema
from alora_serve.types import Choice, Grammar, JsonSchema, Regex, StructuredOutput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

FIELD: Final = "sampling.structured_output"
MAX_COMPLAINT_CHARACTERS: Final = 500

_UNFORCED: Final = '\n\n\n\n%llguidance {"no_forcing": true}'
"""Text that an answer must have is not computed ahead: what a rule that never ends makes of 5 kB ended the process. The
last such line holds; it stands apart from what a complaint quotes."""

_TOO_OPTIONAL: Final = f"more than {MAX_OPTIONAL_PARTS} parts of it may be left out"
_GUIDANCE: Final[JsonCompileOptions] = {
    # Left free, a small model may write white space until its tokens are used up.
    "whitespace_flexible": True,
    "whitespace_pattern": " ?",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
    # No \uXXXX: a key spelt with one would be a declared one in disguise.
    "json_allowed_escapes": '"\\bfnrt',
}
_LARK_SCHEMA: Final = re.compile(rf"(?:{LARK_TEXT})|(?P<schema>%json\s*)", re.DOTALL)

_EMPTY_LINES: Final = re.compile(r"(?: \d+ \|)+$")
"""The end of what a complaint quotes, where nothing stands."""
_UNIMPLEMENTED: Final = re.compile(r"Unimplemented keys: (\[.*\])")


def field_of(form: StructuredOutput) -> str:
    """Path of the form in its request."""
    names = {JsonSchema: "json_schema", Regex: "regex", Grammar: "grammar", Choice: "choice.values"}
    return f"{FIELD}.{names[type(form)]}"


def grammar_of(form: StructuredOutput) -> str:
    """The form in llguidance's own language.

    Raises:
        InvalidRequestError: a JSON schema that asks for what cannot be held to; malformed EBNF.
    """
    match form:
        case JsonSchema(schema):
            return _grammar_of_schema(schema, field_of(form))
        case Regex(pattern):
            if optional_parts(pattern) > MAX_OPTIONAL_PARTS:
                raise complaint(form, _TOO_OPTIONAL)
            regex: str = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
            return regex + _UNFORCED
        case Grammar(grammar):
            return LLMatcher.grammar_from_lark(_lark(grammar, field_of(form)) + _UNFORCED)
        case Choice(values):
            return LLMatcher.grammar_from_regex("|".join(map(_literally, values)))


def refusal(form: StructuredOutput, message: str) -> InvalidRequestError:
    """What llguidance says about a form that it does not compile; of a schema, with the place in it."""
    if not isinstance(form, JsonSchema):
        return complaint(form, message)
    schema = json.loads(form.schema)
    if unimplemented := _UNIMPLEMENTED.search(message):
        places = keyword_places(schema, set(json.loads(unimplemented[1])))
        return complaint(form, "; ".join(f"{keyword!r} at {path} is not supported" for path, keyword in places))
    # As it was given, in whose words it may find its fault; if it has none so, the fault is in what was left of it.
    given = _said_of(schema)
    if not given:
        narrow_schema(schema, field_of(form))
    path, said = place_of_fault(schema, given or message, _said_of)
    if not given and said.startswith(UNSATISFIABLE):
        said = f"it allows no string without {CONTROL_CHARACTERS}"
    return complaint(form, f"at {path or '/'}: {_described(said)}")


def complaint(form: StructuredOutput, message: str) -> InvalidRequestError:
    """What llguidance says about a form, as an error of the field."""
    return InvalidRequestError.of(field_of(form), _described(message)[:MAX_COMPLAINT_CHARACTERS])


def _described(message: str) -> str:
    if "x-guidance" in message:  # it quotes a grammar's schema, which is not as it was given
        message = message.partition("\n")[0]
    if "coerce_one_of" in message:
        return "'oneOf' is supported only where no value fits two of its schemas; use 'anyOf'"
    words = " ".join(message.replace("<non-verbose/>", "").split())
    return _EMPTY_LINES.sub("", words)


def _grammar_of_schema(text: str, field: str) -> str:
    schema = json.loads(text)
    check_schema(schema, field)
    narrow_schema(schema, field)
    try:
        return _json_grammar(schema)
    except ValueError as error:  # what Python's parser takes and others do not, such as half a character
        raise InvalidRequestError.of(field, f"is not JSON: {error}") from error


def _said_of(schema: Any) -> str:
    """What llguidance says about a schema; empty where it compiles."""
    return LLMatcher.validate_grammar(_json_grammar(schema))


def _json_grammar(schema: Any) -> str:
    # Overrides win over what a schema says in "x-guidance": it may not switch off what would refuse it.
    return LLMatcher.grammar_from_json_schema(
        "{}" if schema is True else json.dumps(schema),
        overrides=_GUIDANCE,
    )


def _lark(grammar: str, field: str) -> str:
    try:
        lark = lark_of(grammar) if is_ebnf(grammar) else grammar
    except ValueError as error:
        raise InvalidRequestError.of(field, f"as EBNF: {error}") from error
    try:
        too_optional = most_optional_parts(lark) > MAX_OPTIONAL_PARTS
    except ValueError as error:
        raise InvalidRequestError.of(field, str(error)) from error
    if too_optional:
        raise InvalidRequestError.of(field, _TOO_OPTIONAL)
    return _with_schemas_checked(lark, field)


def _with_schemas_checked(lark: str, field: str) -> str:
    """A grammar whose ``%json`` schemas are held to as those that stand alone."""
    parts, at = list[str](), 0
    try:
        while begun := _LARK_SCHEMA.search(lark, at):
            parts.append(lark[at : begun.end()])
            at = begun.end()
            if begun["schema"]:
                schema, at = json.JSONDecoder().raw_decode(lark, at)
                check_schema(schema, field)
                narrow_schema(schema, field)
                parts.append(json.dumps({**schema, "x-guidance": _GUIDANCE} if isinstance(schema, dict) else schema))
    except RecursionError as error:
        raise InvalidRequestError.of(field, "a schema in it is nested too deeply") from error
    except json.JSONDecodeError:  # llguidance tells where
        return lark
    except ValueError as error:  # an integer of more digits than Python reads
        raise InvalidRequestError.of(field, f"a schema in it cannot be read: {error}") from error
    return "".join((*parts, lark[at:]))


def _literally(text: str) -> str:
    """A regular expression of the text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
