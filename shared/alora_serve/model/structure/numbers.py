"""Numbers of JSON schemas: what holds of the text of an answer must hold of the float that it is parsed to.

llguidance compares digits. By them 0.99999999999999999999 is less than 1, and it is parsed to 1. So exclusive bounds
become inclusive ones a little further in, and bounds of more digits than it reads become ones of fewer.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Final, TypeGuard

MAX_INTEGER: Final = 1 << 53
"""llguidance takes numbers as 64-bit floats, which have every integer up to here."""

_DIGITS: Final = 15
_DECIMALS: Final = 22
"""Of a fraction, so many digits and decimals: llguidance reads them as the nearest float, which tells them apart."""
_SHORT: Final = 4
"""Beginnings of a bound have so many decimals at most, zeros before them not counted."""
_TYPES: Final = ["null", "boolean", "number", "string", "array", "object"]
_BOUNDS: Final = (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1))
"""Bounds of numbers, and which way is inwards."""


def is_float(multiple: float) -> bool:
    """Whether a 64-bit float is what was written. Validators divide by it: 0.29 is no multiple of 0.01 to them."""
    return Decimal(repr(multiple)) == Decimal(multiple)


def narrow_numbers(schema: dict[str, Any]) -> None:
    """Move the bounds of one schema, in place, to where they hold of what is parsed, too."""
    beginnings = list[dict[str, Any]]()
    largest = _largest_multiple(schema.get("multipleOf"))
    for keyword, exclusive, inwards in _BOUNDS:
        told, beyond = schema.get(keyword), schema.get(exclusive)
        if keyword in schema and not _is_number(told):
            continue  # llguidance says so
        bounds: list[float] = [] if largest is None else [-inwards * largest]
        if _is_number(told):
            bounds.append(_within(told, inwards, strictly=beyond is True))  # as draft 4 has it
        if _is_number(beyond):
            bounds.append(_within(beyond, inwards, strictly=True))
        if _is_number(beyond) or (beyond is True and _is_number(told)):
            del schema[exclusive]
        if bounds:
            schema[keyword] = max(bounds, key=lambda bound: bound * inwards)
            beginnings += ({"type": "number", keyword: bound} for bound in _beginnings(schema[keyword], inwards))
    if beginnings and _takes_numbers(schema) and isinstance(every := schema.get("allOf", []), list):
        schema["allOf"] = [*every, {"anyOf": [{"type": schema.get("type", _TYPES)}, *beginnings]}]


def _takes_numbers(schema: dict[str, Any]) -> bool:
    types = schema.get("type", _TYPES)
    return "number" in (types if isinstance(types, list) else [types])


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is one of those that llguidance counts to; it refuses further bounds, or takes them for the last."""
    return type(value) in (int, float) and abs(value) < 1 << 63


def _largest_multiple(divisor: Any) -> int | None:
    """How far each multiple of a float is one, too, and so is their quotient; None where nothing is rounded."""
    return MAX_INTEGER // divisor.as_integer_ratio()[1] if type(divisor) is float and math.isfinite(divisor) else None


def _within(bound: float, inwards: int, *, strictly: bool) -> float:
    """The nearest bound that is read as it is and no less strict; ``strictly`` leaves out ``bound`` itself."""
    told = Decimal(repr(bound))
    rounding = ROUND_CEILING if inwards > 0 else ROUND_FLOOR
    if abs(told) >= 10**_DIGITS:
        whole = int(told.to_integral_value(rounding))
        return _float_within(whole + inwards if strictly and whole == told else whole, inwards)
    step = Decimal(1).scaleb(max(told.adjusted() + 1 - _DIGITS, -_DECIMALS) if told else -_DECIMALS)
    near = told.quantize(step, rounding)
    if strictly and near == told:
        near += inwards * step
    return int(near) if near == int(near) else float(near)


def _beginnings(bound: float, inwards: int) -> list[float]:
    """Numbers that the digits of a bound begin with. llguidance takes none of them for less: no 0.9 below 0.95."""
    if bound * inwards >= 0:
        return []
    whole, _, decimals = f"{Decimal(repr(bound)):f}".partition(".")
    zeros = len(decimals) - len(decimals.lstrip("0"))
    lengths = range(zeros + 1, min(zeros + 1 + _SHORT, len(decimals)))
    return [float(f"{whole}.{decimals[:length]}") for length in lengths]


def _float_within(bound: int, inwards: int) -> int:
    """The nearest 64-bit float that is no less strict than an integer."""
    nearest = float(bound)
    return int(nearest if (int(nearest) - bound) * inwards >= 0 else math.nextafter(nearest, inwards * math.inf))
