"""Intrinsics: what is asked, and results as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from google.protobuf import struct_pb2

from alora_serve.errors import IntrinsicOutputError, InvalidRequestError
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.rpc.convert.events import timings_from_proto, timings_to_proto, usage_from_proto, usage_to_proto
from alora_serve.rpc.convert.names import check_adapter_name, path_to
from alora_serve.rpc.convert.prompt import prompt_to_proto, read_prompt
from alora_serve.rpc.convert.structure import depths
from alora_serve.rpc.convert.text import sendable_texts
from alora_serve.rpc.convert.violations import Violations
from alora_serve.types import IntrinsicResult, IntrinsicRun
from alora_serve.v1 import alora_pb2

MAX_INTRINSICS: Final = 256
MAX_NESTING: Final = 30
"""Lists and objects of a parameter or a result within one another: each is three messages, protobuf reads a hundred."""

_EXACT_INTEGERS: Final = 2.0**53
"""Below this a double holds every integer exactly."""


def run_intrinsic_from_proto(request: alora_pb2.RunIntrinsicRequest) -> IntrinsicRun:
    """One intrinsic.

    Raises:
        InvalidRequestError: with every bad field of the request.
    """
    violations = Violations()
    _check_name(request.intrinsic, violations, "intrinsic")
    run = _read(request, (request.intrinsic,), violations)
    violations.raise_if_any()
    return run


def run_intrinsics_from_proto(request: alora_pb2.RunIntrinsicsRequest) -> IntrinsicRun:
    """Several intrinsics.

    Raises:
        InvalidRequestError: with every bad field of the request.
    """
    violations = Violations()
    count = len(request.intrinsics)
    violations.require(1 <= count <= MAX_INTRINSICS, "intrinsics", f"{count} are not 1 to {MAX_INTRINSICS}")
    for index, name in enumerate(request.intrinsics[:MAX_INTRINSICS]):
        _check_name(name, violations, f"intrinsics[{index}]")
    run = _read(request, tuple(request.intrinsics), violations)
    violations.raise_if_any()
    return replace(run, done=frozenset(request.done))


def _check_name(name: str, violations: Violations, field: str) -> None:
    violations.require(name != "", field, "is empty; name an adapter as ListAdapters does")
    check_adapter_name(name, violations, field)


def _read(
    request: alora_pb2.RunIntrinsicRequest | alora_pb2.RunIntrinsicsRequest,
    names: tuple[str, ...],
    violations: Violations,
) -> IntrinsicRun:
    prompt = read_prompt(request.prompt, violations, field="prompt")
    return IntrinsicRun(prompt, names, _read_struct(request.parameters, violations, "parameters"))


def _read_struct(struct: struct_pb2.Struct, violations: Violations, field: str) -> dict[str, Any]:
    """The object; notes what is wrong with it."""
    return {key: _read_value(value, violations, path_to(field, key)) for key, value in struct.fields.items()}


def _read_value(value: struct_pb2.Value, violations: Violations, field: str) -> Any:
    """The value. Whole numbers become ints: all are doubles here, and an instruction would say ``5.0`` for 5."""
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            violations.require(math.isfinite(number), field, f"{number} is not a JSON number")
            return int(number) if number.is_integer() and abs(number) < _EXACT_INTEGERS else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _read_struct(value.struct_value, violations, field)
        case "list_value":
            return [
                _read_value(item, violations, f"{field}[{index}]") for index, item in enumerate(value.list_value.values)
            ]
        case _:
            return None


@sendable_texts("intrinsic")
def run_intrinsic_to_proto(run: IntrinsicRun) -> alora_pb2.RunIntrinsicRequest:
    """The public request for a run of one intrinsic.

    Raises:
        InvalidRequestError: a parameter holds a value that is not JSON.
    """
    (name,) = run.names
    return alora_pb2.RunIntrinsicRequest(
        prompt=prompt_to_proto(run.prompt), intrinsic=name, parameters=_struct_to_proto(run.parameters, "parameters")
    )


@sendable_texts("intrinsics")
def run_intrinsics_to_proto(run: IntrinsicRun) -> alora_pb2.RunIntrinsicsRequest:
    """The public request. Raises as :func:`run_intrinsic_to_proto`."""
    return alora_pb2.RunIntrinsicsRequest(
        prompt=prompt_to_proto(run.prompt),
        intrinsics=run.names,
        parameters=_struct_to_proto(run.parameters, "parameters"),
    )


def _struct_to_proto(values: Mapping[str, Any], field: str) -> struct_pb2.Struct:
    """The object; ``field`` names it in the error.

    Raises:
        InvalidRequestError: it holds a value that is not JSON, or is nested too deep for protobuf's readers.
    """
    if max(depths(values)) > MAX_NESTING + 1:
        raise InvalidRequestError.of(field, f"has more than {MAX_NESTING} lists and objects in one another")
    struct = struct_pb2.Struct()
    try:
        struct.update(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError.of(field, f"holds a value that is not JSON: {error}") from error
    return struct


def intrinsic_result_to_proto(result: IntrinsicResult) -> alora_pb2.RunIntrinsicResponse:
    """The answer.

    Raises:
        IntrinsicOutputError: the result cannot be sent: nested too deep, or not of JSON's values.
    """
    return alora_pb2.RunIntrinsicResponse(
        result=_value_to_proto(result.result, MAX_NESTING),
        raw_text=result.raw_text,
        usage=usage_to_proto(result.usage),
        timings=timings_to_proto(result.timings),
        probabilities=[
            alora_pb2.CategoryProbabilities(path=path, probabilities=shares)
            for path, shares in result.probabilities.items()
        ],
    )


def intrinsic_result_from_proto(message: alora_pb2.RunIntrinsicResponse) -> IntrinsicResult:
    """The answer; whole numbers are ints.

    Raises:
        InvalidRequestError: a number that is not finite.
    """
    violations = Violations()
    result = _read_value(message.result, violations, "result")
    violations.raise_if_any()
    return IntrinsicResult(
        result,
        message.raw_text,
        usage_from_proto(message.usage),
        timings_from_proto(message.timings),
        {place.path: dict(place.probabilities) for place in message.probabilities},
    )


def _value_to_proto(value: Any, levels: int) -> struct_pb2.Value:
    if levels < 0:
        raise IntrinsicOutputError(f"the result has more than {MAX_NESTING} lists and objects in one another")
    match value:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=value)
        case int() | float():
            return struct_pb2.Value(number_value=_double(value))
        case str():
            return struct_pb2.Value(string_value=_text(value))
        case list():
            items = [_value_to_proto(item, levels - 1) for item in value]
            return struct_pb2.Value(list_value=struct_pb2.ListValue(values=items))
        case _:
            fields = {_text(name): _value_to_proto(item, levels - 1) for name, item in value.items()}
            return struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))


def _double(number: float) -> float:
    try:
        double = float(number)
    except OverflowError:
        double = math.inf
    if not math.isfinite(double):
        raise IntrinsicOutputError("the result has a number beyond those of JSON's readers")
    return double


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise IntrinsicOutputError(f"the result has half of a surrogate pair: {excerpt(text)}") from error
    return text
