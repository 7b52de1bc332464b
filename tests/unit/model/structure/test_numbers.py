"""What bounds and divisors allow as text, validators allow once it is parsed."""

from __future__ import annotations

import json
import math
from decimal import Decimal, localcontext
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alora_serve.errors import InvalidRequestError
from held_forms import COMPILER, holds, refusal, schema

LOW, HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
bounds = st.floats(-1e16, 1e16) | st.floats(-2, 2) | st.integers(-(2**54), 2**54) | st.integers(-3, 3)


def texts_near(number: float) -> list[str]:
    """The number as text, its neighbours, and what has more digits than any of them."""
    told = Decimal(repr(number))
    neighbours = [Decimal(repr(math.nextafter(number, math.copysign(math.inf, way)))) for way in (-1, 1)]
    steps = [Decimal(sign).scaleb(-places) for sign in (-1, 1) for places in (0, 1, 16, 30)]
    with localcontext(prec=400):
        return [written(value) for value in (told, *neighbours, *(told + step for step in steps))]


def written(value: Decimal) -> str:
    whole, _, fraction = f"{value:f}".partition(".")
    return f"{whole}.{fraction.rstrip('0')}".removesuffix(".")


def wrong(told: dict[str, Any], texts: list[str]) -> list[str]:
    """Those that the schema allows as text and a validator does not."""
    form = schema(**told)
    taken = [text for text in texts if holds(form, text)]
    return [text for text in taken if not jsonschema.Draft202012Validator(told).is_valid(json.loads(text))]


@settings(max_examples=60, deadline=None)
@given(bounds, bounds, st.sampled_from(LOW), st.sampled_from(HIGH), st.sampled_from(["number", "integer"]))
@example(0, 1, "exclusiveMinimum", "exclusiveMaximum", "number")
@example(0.9999999999999999, 2, "minimum", "maximum", "number")
@example(-1, 0.9999999999999999, "minimum", "maximum", "number")
@example(-1, 5e-324, "exclusiveMinimum", "exclusiveMaximum", "number")
@example(0.1, 0.1, "minimum", "maximum", "number")
def test_bounds_hold_once_an_answer_is_parsed(first: float, second: float, low: str, high: str, kind: str) -> None:
    texts = [text for number in (first, second) for text in texts_near(number)]
    least, most = sorted((first, second))
    for told in ({low: least}, {high: most}, {low: least, high: most}):
        try:
            assert wrong({"type": kind, **told}, texts) == []
        except InvalidRequestError:  # nothing lies between them
            assert len(told) == 2
            assert most - least <= 1 or most - least < 1e-14 * abs(most)


@pytest.mark.parametrize(
    ("told", "good", "bad"),
    [
        (
            {"exclusiveMaximum": 1},
            ["0.99999999999999", "0.9", "0.99", "0.5", "0", "-7.5"],
            ["1", "0.99999999999999999999"],
        ),
        ({"exclusiveMinimum": 0}, ["0.0000000000000000000001", "0.02", "3"], ["0", "-0", f"0.{'0' * 400}1"]),
        ({"exclusiveMinimum": 0, "minimum": 2}, ["2"], ["1.9"]),
        ({"exclusiveMinimum": 2, "minimum": 0}, ["2.1"], ["2"]),
        ({"maximum": 0.1}, ["0.1", "0.09", "0"], ["0.11", "0.100000000000000001"]),
        ({"maximum": 99.9575}, ["99", "99.9", "99.95", "99.957", "99.9575", "9.9"], ["99.96", "99.9576", "100"]),
        ({"exclusiveMinimum": -1, "maximum": 0.95}, ["-0.9", "-0.99", "0.9", "0.94", "0"], ["-1", "0.96", "1"]),
        ({"maximum": 0.00375}, ["0.003", "0.001", "0", "-0.01"], ["0.004", "0.01"]),
        ({"exclusiveMaximum": 1e-7}, ["0.00000009", "0", "-1.5"], ["0.0000001", "0.1"]),
        ({"exclusiveMaximum": 9.5, "allOf": [{"minimum": 9.25}]}, ["9.4", "9.49", "9.25"], ["9.5", "9.2"]),
        ({"maximum": 1, "exclusiveMaximum": True}, ["0.9"], ["1", "0.99999999999999999999"]),
        ({"maximum": 1, "exclusiveMaximum": False}, ["0.9", "1"], ["1.1"]),
        ({"exclusiveMaximum": 5, "type": "integer"}, ["4", "-3"], ["5"]),
        ({"exclusiveMinimum": 2**53 - 3, "type": "integer"}, [str(2**53 - 2)], [str(2**53 - 3)]),
        ({"exclusiveMinimum": 2, "allOf": [{"maximum": 4.5}]}, ["3", "4.5"], ["2", "4.6"]),
        ({"type": ["number", "null"], "exclusiveMaximum": 1}, ["0.9", "0.90", "null", "-3"], ["1", '"a"']),
        ({"type": ["string", "integer"], "exclusiveMaximum": 1}, ['"a"', "0"], ["1", "0.9"]),
        ({"allOf": [{"exclusiveMaximum": 100}]}, ["99.9", "99", "-1"], ["100", "100.1"]),
        (
            {"type": ["array", "number"], "items": {"maximum": 2}, "maximum": 0.95},
            ["0.9", "[1, 2]"],
            ["1", "[3]"],
        ),
    ],
)
def test_bounds_leave_what_is_within(told: dict[str, Any], good: list[str], bad: list[str]) -> None:
    form = schema(**{"type": "number", **told})
    assert [text for text in good if not holds(form, text)] == []
    assert [text for text in bad if holds(form, text)] == []


@pytest.mark.parametrize("divisor", [0.5, 0.25, 1.5, 2.5, 0.375, 7.0, 10.0, 3, 99])
def test_multiples_are_ones_once_they_are_parsed(divisor: float) -> None:
    exact = Decimal(repr(divisor))
    counts = [0, 1, -3, 7, 123_456_789, 2**50 + 1, 2_100_000_000_000_001, 2**52 + 3, 2**53 + 1, 2**55 + 5, 2**70 + 3]
    texts = [written(count * exact) for count in counts]
    assert wrong({"type": "number", "multipleOf": divisor}, [*texts, "1", "0.1", "2.25"]) == []
    form = schema(type="number", multipleOf=divisor)
    assert all(holds(form, text) for text in texts[:5])


@pytest.mark.parametrize("divisor", [0.01, 0.1, 0.37, 1e-9, 0.30000000000000004])
def test_a_divisor_that_no_float_is_is_refused_by_its_place(divisor: float) -> None:
    told = str(refusal(schema(properties={"price": {"type": "number", "multipleOf": divisor}})))
    assert f"'multipleOf' at /properties/price is not supported with {divisor}, which no 64-bit float is" in told


@pytest.mark.parametrize(
    "told", [{"minimum": "a"}, {"exclusiveMaximum": [1]}, {"minimum": None, "exclusiveMinimum": 1}]
)
def test_a_bound_that_is_no_number_is_told_as_it_was_given(told: dict[str, Any]) -> None:
    assert f"Expected f64 for '{next(iter(told))}'" in str(refusal(schema(**told)))


@pytest.mark.parametrize("bound", [1.7976931348623157e308, -1e300, 10**300])
@pytest.mark.parametrize("keyword", [*LOW, *HIGH])
def test_bounds_beyond_what_is_counted_are_refused(keyword: str, bound: float) -> None:
    assert "Failed to generate regex" in str(refusal(schema(type="number", **{keyword: bound})))


def test_bounds_of_parts_that_are_no_numbers_are_left_alone() -> None:
    COMPILER.compile(schema(type="object", properties={"minimum": {"type": "string"}, "multipleOf": {}}))
