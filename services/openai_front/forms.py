"""The form an answer must have: by ``response_format``, by vLLM's fields, or by a tool that must be called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from alora_serve.errors import InvalidRequestError
from alora_serve.types import Choice, Grammar, JsonSchema, Regex, StructuredOutput
from openai_front.field_names import ALL_TOOLS
from openai_front.request_fields import Body, CompletionFields, Ignored, Text


class TextFormat(Body):
    """No form at all."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema under a name for people."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: Ignored = None
    description: Ignored = None
    strict: Ignored = None
    content: dict[str, Any] | None = Field(None, alias="schema")


class JsonSchemaFormat(Body):
    """JSON of a schema: always held to it, whatever ``strict`` says."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class NamedFunction(Body):
    """Whose call is meant."""

    name: Text


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class AskedForm:
    """A form, and the field of the request that has it."""

    form: StructuredOutput
    field: str


def chosen_form(
    fields: CompletionFields,
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None,
    functions: Sequence[Mapping[str, Any]],
) -> AskedForm | None:
    """The one form that a request asks for; None leaves the answer free.

    Raises:
        InvalidRequestError: it asks for two, for one that leaves no room to call the tools that may be called, or for a
            tool that it does not bring.
    """
    asked = {
        "response_format": _of_format(response_format),
        "tool_choice": _of_tools(tool_choice, functions),
        **_of_vllm(fields),
    }
    given = {name: form for name, form in asked.items() if form is not None}
    if len(given) > 1:
        raise InvalidRequestError.of(list(given)[1], f"asks for a form, and so does {next(iter(given))}; give one")
    if given and functions and tool_choice in (None, "auto"):
        field = next(iter(given))
        raise InvalidRequestError.of(field, "leaves no room to call a tool; leave it out, or set tool_choice to none")
    return next(iter(given.values()), None)


def _of_format(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> AskedForm | None:
    match wanted:
        case JsonObjectFormat():
            return AskedForm(_json_schema({"type": "object"}), "response_format")
        case JsonSchemaFormat():
            return AskedForm(_json_schema(wanted.json_schema.content or {}), "response_format.json_schema.schema")
        case _:
            return None


def _of_vllm(fields: CompletionFields) -> dict[str, AskedForm | None]:
    """By the path of each field."""
    outputs = fields.structured_outputs
    if outputs is None:
        return _forms("guided_", fields.guided_json, fields.guided_regex, fields.guided_choice, fields.guided_grammar)
    path = "structured_outputs."
    legacy = (fields.guided_json, fields.guided_regex, fields.guided_choice, fields.guided_grammar)
    return {
        **_forms(path, outputs.json_schema, outputs.regex, outputs.choice, outputs.grammar),
        **_forms("guided_", *legacy),
    }


def _forms(
    path: str,
    schema: Mapping[str, Any] | str | None,
    regex: str | None,
    choice: Sequence[str] | None,
    grammar: str | None,
) -> dict[str, AskedForm | None]:
    forms: dict[str, StructuredOutput | None] = {
        f"{path}json": None if schema is None else _json_schema(schema),
        f"{path}regex": None if regex is None else Regex(regex),
        f"{path}choice": None if choice is None else Choice(tuple(choice)),
        f"{path}grammar": None if grammar is None else Grammar(grammar),
    }
    return {field: None if form is None else AskedForm(form, field) for field, form in forms.items()}


def _of_tools(
    choice: Literal["none", "auto", "required"] | NamedTool | None, functions: Sequence[Mapping[str, Any]]
) -> AskedForm | None:
    """A call as its parameters alone where the tool is named, else as ``{"name", "arguments"}``."""
    if (choice == "required" or isinstance(choice, NamedTool)) and not functions:
        raise InvalidRequestError.of("tool_choice", "needs tools to choose from")
    if choice == "required":
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": _embedded(function, index)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for index, function in enumerate(functions)
        ]
        return AskedForm(_json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls}), ALL_TOOLS)
    if isinstance(choice, NamedTool):
        for index, function in enumerate(functions):
            if function["name"] == choice.function.name:
                return AskedForm(_json_schema(_parameters(function)), f"{ALL_TOOLS}[{index}].function.parameters")
        raise InvalidRequestError.of("tool_choice.function.name", "is the name of none of the tools")
    return None


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or {"type": "object"}


def _embedded(function: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The parameters as a schema within another one. Their ``$id`` makes them the root of what their ``$ref`` point to.

    ``$schema`` is left out, since drafts before 2019 take no ``$id`` beside a ``$ref``.
    """
    parameters = {keyword: value for keyword, value in _parameters(function).items() if keyword != "$schema"}
    return {**parameters, "$id": f"/tools/{index}/"}


def _json_schema(schema: Mapping[str, Any] | str) -> JsonSchema:
    return JsonSchema(schema if isinstance(schema, str) else json.dumps(schema))
