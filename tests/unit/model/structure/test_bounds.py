"""Forms of a few bytes that would take all memory, or minutes, are refused before they are compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from alora_serve.model.structure.bounds import MAX_OPTIONAL_PARTS, most_optional_parts, odd_divisor, optional_parts
from alora_serve.types import Grammar, Regex
from held_forms import holds, refusal, schema

DOUBLED = "\n".join(f"T{index}: T{index + 1} T{index + 1}" for index in range(16))


def doubled_in_ebnf(last: str) -> str:
    return "\n".join(["root ::= r0", *(f"r{index} ::= r{index + 1} r{index + 1}" for index in range(16)), last])


def joined(count: int, **more: Any) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": f"a{index:02}", **more} for index in range(count)]}


def one_beside_another(count: int) -> dict[str, Any]:
    links = {f"d{i}": {"type": "string", "pattern": f"a{i:02}", "$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {}}}


def of_one_property(count: int) -> dict[str, Any]:
    return {"allOf": [{"properties": {"a": {"pattern": f"a{index:02}"}}} for index in range(count)]}


TOO_OPTIONAL = "more than 1000 parts of it may be left out"
TOO_JOINT = "more than 8 different patterns and formats"
HUNGRY = [
    ("regex", r"\w*" * 8000, TOO_OPTIONAL),
    ("regex", "(a|)" * 20_000, TOO_OPTIONAL),
    ("grammar", f'start: T0\n{DOUBLED}\nT16: "a"?', TOO_OPTIONAL),
    ("grammar", f'start: T0\n{DOUBLED}\nT16: "a" |', TOO_OPTIONAL),
    ("grammar", f'start: T0\n{DOUBLED}\nT16: ["a"]', TOO_OPTIONAL),
    ("grammar", f"start: T0\n{DOUBLED}\nT16: /a|/ // none?", TOO_OPTIONAL),
    ("grammar", doubled_in_ebnf("r16 ::= [a-z]?"), TOO_OPTIONAL),
    ("grammar", f'%ignore /{"a?" * 20_000}/\nstart: "a"', TOO_OPTIONAL),
    ("grammar", f"start: %json {json.dumps(joined(30))}", TOO_JOINT),
    ("schema", json.dumps({"pattern": "a?" * 20_000}), "'pattern' at / is not supported with more than 1000 parts"),
    ("schema", json.dumps({"patternProperties": {"^" + "a?" * 20_000: {}}}), "'patternProperties' at /"),
    ("schema", json.dumps(joined(30)), TOO_JOINT),
    ("schema", json.dumps(one_beside_another(30)), TOO_JOINT),
    ("schema", json.dumps(of_one_property(30)), TOO_JOINT),
    ("schema", '{"type": "integer", "multipleOf": 9999991}', "'multipleOf' at / is not supported beyond 100000"),
]
COMPILED = """
import json, resource, sys
from alora_serve.errors import InvalidRequestError
from alora_serve.types import Choice, Grammar, JsonSchema, Regex
from held_forms import COMPILER

COMPILER.compile(Choice(("a", "b")))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 30)  # a quarter of it is the stack on which forms are compiled
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for kind, text, said in json.load(sys.stdin):
    print("compiling", kind, text[:60], file=sys.stderr)
    try:
        COMPILER.compile({"regex": Regex, "grammar": Grammar, "schema": JsonSchema}[kind](text))
    except InvalidRequestError as error:
        assert said in str(error), error
    else:
        raise AssertionError("it was compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system bounds memory on Linux alone")
def test_what_would_take_all_memory_is_refused() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=environment,
        input=json.dumps(HUNGRY),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]


def test_what_stays_within_the_bounds_is_held_to() -> None:
    words = Regex("|".join(f"word{index}s?" for index in range(MAX_OPTIONAL_PARTS)))
    assert holds(words, "word999s")
    assert holds(Regex("a{0,5000}(bc?){300}"), "aa" + "bcb" * 150)
    assert holds(schema(**joined(4)), '"a00a01a02a03"')
    dates = {f"d{index}": {"type": "string", "format": "date", "pattern": f"{index}$"} for index in range(20)}
    assert holds(schema(properties=dates, allOf=[{"required": ["d1"]}]), '{"d1":"2024-02-01"}')
    assert holds(schema(type="integer", multipleOf=100_000), "300000")


@pytest.mark.parametrize(
    ("expression", "count"),
    [("abc", 0), ("a?b*c{0,2}d{,3}", 4), ("(|a)(b|)(c||d)()", 4), ("|a", 1), ("a|", 1), ("", 1), ("a|b+", 0)],
)
def test_optional_parts_are_counted(expression: str, count: int) -> None:
    assert optional_parts(expression) == count


def test_terminals_have_what_those_in_them_have() -> None:
    assert most_optional_parts('start: A b?\nb: A A "?" // A?\nA: B B /c?/\n | "x"\nB: "d"? "" | "e"~0..2') == 7
    assert "leads back to itself" in str(refusal(Grammar('start: "a"\nA: B\nB: A')))


@pytest.mark.parametrize(
    ("multiple", "divisor"), [(3, 3), (100_000, 1), (0.37, 37), (1e-9, 1), (70, 7), (-6, 3), (0, 0), (2.5e20, 1)]
)
def test_factors_of_ten_do_not_count(multiple: float, divisor: int) -> None:
    assert odd_divisor(multiple) == divisor


def test_a_schema_in_a_grammar_is_held_to_as_one_alone() -> None:
    form = Grammar('start: "<" %json {"type": "object", "additionalProperties": {"pattern": "^[^\\"]*$"}} ">" // %json')
    assert holds(form, '<{"a": "b"}>')
    assert not holds(form, '<{"a":  "b"}>')
    assert not holds(form, r'<{"a":"\""}>')
    told = 'start: %json {"not": {}, "x-guidance": {"lenient": true}}'
    assert 'Unimplemented keys: ["not"]' in str(refusal(Grammar(told)))
    assert "'const' at /items is not supported" in str(refusal(Grammar('start: %json {"items": {"const": "\\u0001"}}')))
    assert "use 'anyOf'" in str(refusal(Grammar('start: %json {"oneOf": [{"minimum": 1}, {"maximum": 3}]}')))
    assert "%json" in str(refusal(Grammar('start: %json {"type":')))
