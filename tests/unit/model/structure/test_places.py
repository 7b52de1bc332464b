"""What is wrong with a JSON schema is told with the place of the innermost schema that has it."""

from __future__ import annotations

from typing import Any

import pytest

from alora_serve.model.structure import forms
from alora_serve.model.structure.places import MAX_TRIALS, MAX_TRIED_CHARACTERS
from held_forms import refusal, schema

BROKEN: dict[str, Any] = {"type": "strin"}
NARROW = {"type": "integer", "minimum": 3, "maximum": 1}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (BROKEN, "at /: Invalid type: strin"),
        (
            {"properties": {"a": {}, "b": {"format": "uri-reference"}}},
            "at /properties/b: Unknown format: uri-reference",
        ),
        ({"items": {"anyOf": [{"type": "null"}, {"pattern": "(a"}]}}, "at /items/anyOf/1: regex parse error: (a"),
        ({"additionalProperties": {"allOf": [{}, BROKEN]}}, "at /additionalProperties/allOf/1: Invalid type"),
        ({"patternProperties": {"^a/~": {"prefixItems": [BROKEN]}}}, "at /patternProperties/^a~1~0/prefixItems/0: "),
        (
            {"properties": {"a": {"oneOf": [{"type": "string"}, {"const": "b"}]}}},
            "at /properties/a: 'oneOf' is supported",
        ),
        ({"properties": {"a": {"minLength": "x"}}}, "at /properties/a: Expected positive integer"),
        ({"properties": {"a": 5}}, "at /properties/a: schema must be an object or boolean"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "at /properties/a: Pointer '/nowhere' does not exist"),
        (
            {"properties": {"a": {"$ref": "https://example.com/x"}}},
            "at /properties/a: Resource 'https://example.com/x'",
        ),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "at /: Unsatisfiable schema: incompatible types"),
    ],
)
def test_a_fault_is_told_with_its_place(form: dict[str, Any], said: str) -> None:
    assert f"sampling.structured_output.json_schema: {said}" in str(refusal(schema(**form)))


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ({"items": {"$ref": "#/$defs/a"}, "$defs": {"other": BROKEN, "a": {"items": BROKEN}}}, "/$defs/a/items"),
        (
            {"items": {"$ref": "#/definitions/a~1b%25%20%C3%A9"}, "definitions": {"a/b% é": BROKEN}},
            "/definitions/a~1b% é",
        ),
        ({"items": {"$ref": "#/properties/a"}, "properties": {"a": BROKEN}}, "/properties/a"),
        ({"properties": {"children": {"items": {"$ref": "#"}}, "a": BROKEN}}, "/properties/a"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}, "format": 3}}}, "/$defs/a"),
        ({"$id": "https://example.com/x", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": BROKEN}}, "/$defs/a"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{}, {**BROKEN, "dependentRequired": 1}]},
            "/items/1",
        ),
    ],
)
def test_references_are_followed(form: dict[str, Any], place: str) -> None:
    assert f"at {place}" in str(refusal(schema(**form)))


def test_of_schemas_that_no_value_fits_the_one_that_must_hold_is_told() -> None:
    inner = {"type": "object", "properties": {"may": NARROW, "must": NARROW}, "required": ["must"]}
    form = schema(type="object", properties={"may": NARROW, "a": inner}, required=["a"])
    assert "at /properties/a/properties/must: Unsatisfiable schema: minimum (3)" in str(refusal(form))


def test_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of many parts are tried at once. Where the fault is out of reach, the place is that of a part it is in."""
    trials, said_of = list[Any](), forms._said_of

    def counted(part: Any) -> str:
        trials.append(part)
        return said_of(part)

    monkeypatch.setattr(forms, "_said_of", counted)
    wide = {f"p{index}": {} for index in range(1000)}
    assert "at /properties/last: " in str(refusal(schema(properties={**wide, "last": BROKEN})))
    assert len(trials) < 20
    deep = BROKEN
    for _ in range(60):
        deep = {"properties": {"a": {}, "b": {}, "c": deep}}
    trials.clear()
    place = str(refusal(schema(**deep))).split()[2]
    assert 10 < place.count("/properties/c") < 60
    assert len(trials) <= MAX_TRIALS + 2
    trials.clear()
    large = schema(description="x" * (100 << 10), **deep)
    assert "at /properties/c/" in str(refusal(large))
    assert len(trials) <= MAX_TRIED_CHARACTERS // (100 << 10) + 2
    chain = {f"d{index}": {"items": {"$ref": f"#/$defs/d{index + 1}"}} for index in range(300)} | {"d300": BROKEN}
    trials.clear()
    assert "at /$defs/d" in str(refusal(schema(**{"$ref": "#/$defs/d0", "$defs": chain})))
    assert len(trials) <= MAX_TRIALS + 2
