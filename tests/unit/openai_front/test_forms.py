"""The form of a call that must be made holds to the parameters of each tool, wherever these refer to themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alora_serve.errors import InvalidRequestError
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.structure.compiler import FormCompiler
from alora_serve.model.structure.vocabulary import TokenVocabulary
from openai_front.chat_request import ChatRequest
from openai_front.field_names import as_asked
from small_tokenizers import byte_level_tokenizer

TOKENIZER = ChatTokenizer(byte_level_tokenizer())
VOCABULARY = TokenVocabulary(TOKENIZER, TOKENIZER.vocabulary_size)
COMPILER = FormCompiler(VOCABULARY)
CITY = {"enum": ["Rome", "Oslo"]}


def requiring(*tools: dict[str, Any], choice: Any = "required") -> ChatRequest:
    """A request that must be answered by a call of one of these."""
    functions = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": each}} for i, each in enumerate(tools)
    ]
    return ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "Hello"}],
            "tools": functions,
            "tool_choice": choice,
        }
    )


def takes(call: dict[str, Any], *tools: dict[str, Any]) -> bool:
    """Whether ``call`` may be the answer where one of tools ``f0``, ``f1``, ... with these parameters is required."""
    form = requiring(*tools).sampling_params().structured_output
    assert form is not None
    matcher = COMPILER.compile(form).matcher()
    tokens = VOCABULARY.tokens.greedy_tokenize(json.dumps(call))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


REFERRING = {
    "$defs": an_object(a={"$ref": "#/$defs/City"}) | {"$defs": {"City": CITY}},
    "a pointer with escapes": an_object(a={"$ref": "#/definitions/x~1y~0"}) | {"definitions": {"x/y~": CITY}},
    "a neighbour": an_object(b=CITY, a={"$ref": "#/properties/b"}),
    "the whole": {"anyOf": [CITY, an_object(a={"$ref": "#"})]},
    "an anchor": an_object(a={"$ref": "#city"}) | {"$defs": {"City": {**CITY, "$anchor": "city"}}},
    "an id": an_object(a={"$ref": "city"}) | {"$defs": {"City": {**CITY, "$id": "city"}}},
    "all of it in a definition": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$ref": "#/definitions/Place",
        "definitions": {"Place": an_object(a={"$ref": "#/definitions/City"}), "City": CITY},
    },
    "a name of a schema": an_object(a={"$ref": "#/$defs/City"})
    | {"$id": "https://example.com/", "$defs": {"City": CITY}},
}


@pytest.mark.parametrize("parameters", REFERRING.values(), ids=REFERRING)
def test_parameters_may_refer_to_themselves(parameters: dict[str, Any]) -> None:
    other = an_object(a={"$ref": "#/$defs/City"}) | {"$defs": {"City": {"type": "integer"}}}
    for tools in ([parameters], [parameters, other]):
        assert takes({"name": "f0", "arguments": {"a": "Rome"}}, *tools)
        assert not takes({"name": "f0", "arguments": {"a": "Paris"}}, *tools)
        assert not takes({"name": "f0", "arguments": {"a": 3}}, *tools)
    assert takes({"name": "f1", "arguments": {"a": 3}}, parameters, other)
    assert not takes({"name": "f1", "arguments": {"a": "Rome"}}, parameters, other)


def test_what_only_looks_like_a_reference_is_none() -> None:
    text = "#/$defs/City"
    parameters = an_object(**{"$ref": {"const": text}, "b": {"enum": [text, {"$ref": text}], "default": text}})
    assert takes({"name": "f0", "arguments": {"$ref": text}}, parameters)
    assert takes({"name": "f0", "arguments": {"b": {"$ref": text}}}, parameters)
    assert not takes({"name": "f0", "arguments": {"$ref": "#/properties/arguments/$defs/City"}}, parameters)


NAMED = {"type": "function", "function": {"name": "f1"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"uniqueItems": True}, "'uniqueItems' at /properties/a is not supported"),
        ({"type": "nonsense"}, "at /properties/a: "),
    ],
)
def test_what_parameters_ask_for_in_vain_is_told_by_their_tool(
    choice: Any, bad: dict[str, Any], complaint: str
) -> None:
    request = requiring(an_object(a=CITY), an_object(a=bad), choice=choice)
    form = request.sampling_params().structured_output
    assert form is not None
    with pytest.raises(InvalidRequestError) as refused:
        COMPILER.compile(form)
    told = as_asked(refused.value, request.field_names)
    (violation,) = told.violations
    assert violation.field == "sampling.tools[1].function.parameters"
    assert violation.description.startswith(complaint)
    assert str(told) == f"{violation.field}: {violation.description}"
