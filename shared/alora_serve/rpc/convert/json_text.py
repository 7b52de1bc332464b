"""JSON objects that travel as text: a chat template prints keys in their order, which protobuf's maps do not keep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.convert.structure import depths, refuse_constant
from alora_serve.rpc.convert.violations import Violations

MAX_JSON_NESTING: Final = 30
"""Lists and objects of a request's JSON within one another."""

_TOO_DEEP: Final = f"has more than {MAX_JSON_NESTING} lists and objects in one another"


def read_object(text: str, violations: Violations, field: str) -> dict[str, Any]:
    """The object, its keys in the order of the text; notes what is wrong with it, and is empty then."""
    try:
        return _parsed(text)
    except ValueError as error:
        violations.add(field, str(error))
        return {}


def object_to_text(values: Mapping[str, Any], field: str) -> str:
    """The object as text, its keys in their order; ``field`` names it in the error.

    Raises:
        InvalidRequestError: it is no object, holds a value that is not JSON, or is nested too deep.
    """
    try:
        text = json.dumps(values, ensure_ascii=False, default=_plain)
        _parsed(text)
    except RecursionError as error:
        raise InvalidRequestError.of(field, _TOO_DEEP) from error
    except TypeError as error:
        raise InvalidRequestError.of(field, f"is not JSON: {error}") from error
    except ValueError as error:
        raise InvalidRequestError.of(field, str(error)) from error
    return text


def _plain(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no type of its values")


def _parsed(text: str) -> dict[str, Any]:
    """Raises ValueError with what the caller is told."""
    try:
        found = json.loads(text, parse_constant=refuse_constant, parse_float=_finite, parse_int=_integer)
        json.dumps(found, ensure_ascii=False).encode()  # An escape may spell half of a surrogate pair.
        nesting = max(depths(found))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    if nesting > MAX_JSON_NESTING + 1:
        raise ValueError(_TOO_DEEP)
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is beyond those of its readers")
    return number


def _integer(digits: str) -> int:
    _finite(digits)
    return int(digits)
