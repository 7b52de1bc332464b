"""Sampling parameters and resume points, with every range checked and named."""

from __future__ import annotations

from typing import Any, Final

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc.convert.structure import read_structure, structure_to_proto
from alora_serve.rpc.convert.text import sendable_texts
from alora_serve.rpc.convert.tokens import pack_token_ids, unpack_token_ids
from alora_serve.rpc.convert.violations import Violations
from alora_serve.types import AdapterDigest, Resume, SamplingParams, TokenIds
from alora_serve.v1 import types_pb2

MAX_TEMPERATURE: Final = 100.0
MAX_PENALTY: Final = 2.0
LEAST_REPETITION_PENALTY: Final = types_pb2.SamplingParams(repetition_penalty=0.01).repetition_penalty  # as float32
MAX_REPETITION_PENALTY: Final = 100.0
"""No use of it comes near either end; far beyond, a logit divided or multiplied by it is finite no more."""
MAX_LOGIT_BIAS: Final = 100.0
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_SAMPLES: Final = 64

_OPTIONAL_FIELDS: Final = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "default_max_tokens",
)
"""Fields with presence in the proto, where unset means the default of :class:`SamplingParams`."""


def sampling_from_proto(
    message: types_pb2.SamplingParams, *, field: str = "sampling", sample_index: int = 0
) -> SamplingParams:
    """The checked parameters; ``field`` is the path of the message in its request.

    Raises:
        InvalidRequestError: with every value that is out of range.
    """
    violations = Violations()
    params = read_sampling(message, violations, field=field, sample_index=sample_index)
    violations.raise_if_any()
    return params


def read_sampling(
    message: types_pb2.SamplingParams,
    violations: Violations,
    *,
    field: str,
    sample_index: int = 0,
    max_samples: int = 1,
) -> SamplingParams:
    """As :func:`sampling_from_proto`, but notes what is wrong instead of raising."""
    given: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    params = SamplingParams(
        **given,
        logit_bias=dict(message.logit_bias),
        sample_index=sample_index,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs or message.top_logprobs > 0,
        top_logprobs=message.top_logprobs,
        n=message.n or 1,
        structured_output=read_structure(message.structured_output, violations, field=f"{field}.structured_output")
        if message.HasField("structured_output")
        else None,
    )
    _check_ranges(params, violations, field)
    one = "is for Generate alone; name a target several times, and each is a sample of its own"
    too_many = one if max_samples == 1 else f"{params.n} samples are more than {max_samples}"
    violations.require(params.n <= max_samples, f"{field}.n", too_many)
    return params


def _check_ranges(params: SamplingParams, violations: Violations, field: str) -> None:
    """Every condition is written so that NaN, which compares false with everything, fails it."""
    require = violations.require
    require(params.max_tokens != 0, f"{field}.max_tokens", "0 is not at least 1")
    require(params.default_max_tokens != 0, f"{field}.default_max_tokens", "0 is not at least 1")
    require(
        0 <= params.temperature <= MAX_TEMPERATURE,
        f"{field}.temperature",
        f"{params.temperature:g} is not in [0, {MAX_TEMPERATURE:g}]",
    )
    require(0 < params.top_p <= 1, f"{field}.top_p", f"{params.top_p:g} is not in (0, 1]")
    require(0 <= params.min_p < 1, f"{field}.min_p", f"{params.min_p:g} is not in [0, 1)")
    require(
        LEAST_REPETITION_PENALTY <= params.repetition_penalty <= MAX_REPETITION_PENALTY,
        f"{field}.repetition_penalty",
        f"{params.repetition_penalty:g} is not in [{LEAST_REPETITION_PENALTY:g}, {MAX_REPETITION_PENALTY:g}]",
    )
    for name, penalty in (
        ("presence_penalty", params.presence_penalty),
        ("frequency_penalty", params.frequency_penalty),
    ):
        require(
            -MAX_PENALTY <= penalty <= MAX_PENALTY,
            f"{field}.{name}",
            f"{penalty:g} is not in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]",
        )
    for token_id, bias in params.logit_bias.items():
        require(
            -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS,
            f"{field}.logit_bias[{token_id}]",
            f"{bias:g} is not in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]",
        )
    require(
        len(params.stop) <= MAX_STOP_STRINGS,
        f"{field}.stop",
        f"{len(params.stop)} stop strings are more than {MAX_STOP_STRINGS}",
    )
    require(
        params.top_logprobs <= MAX_TOP_LOGPROBS,
        f"{field}.top_logprobs",
        f"{params.top_logprobs} is more than {MAX_TOP_LOGPROBS}",
    )
    require(
        not (params.ignore_eos and params.structured_output),
        f"{field}.ignore_eos",
        "structured_output says where the answer ends: leave one of them unset",
    )
    for index, stop in enumerate(params.stop[:MAX_STOP_STRINGS]):
        require(stop != "", f"{field}.stop[{index}]", "is empty, which would stop before any text")
        require(
            len(stop) <= MAX_STOP_CHARACTERS,
            f"{field}.stop[{index}]",
            f"{len(stop)} characters are more than {MAX_STOP_CHARACTERS}",
        )


@sendable_texts("sampling")
def sampling_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    """All values but ``sample_index``, which travels beside the parameters."""
    return types_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        top_logprobs=params.top_logprobs,
        n=params.n,
        structured_output=structure_to_proto(params.structured_output) if params.structured_output else None,
        default_max_tokens=params.default_max_tokens,
    )


def read_resume(message: types_pb2.Resume, max_tokens: int, violations: Violations, *, field: str) -> Resume:
    """Where a stream of at most ``max_tokens`` stood; notes what is wrong. The sampling parameters have its seed."""
    tokens: TokenIds = ()
    path = f"{field}.generated_token_ids"
    try:
        tokens = unpack_token_ids(message.generated_token_ids, path)
    except InvalidRequestError as error:
        violations.extend(error.violations)
    else:
        given = len(tokens)
        violations.require(given > 0, path, "has no tokens: nothing was delivered that could be gone on with")
        violations.require(given <= max_tokens, path, f"{given} tokens are more than max_tokens {max_tokens}")
    return Resume(
        generated_tokens=tokens,
        invocation_start=message.invocation_start if message.HasField("invocation_start") else None,
        adapter_digest=AdapterDigest(message.adapter_digest),
        model_digest=message.model_digest,
    )


def resume_to_proto(resume: Resume, seed: int | None) -> types_pb2.Resume:
    """``seed`` is the interrupted stream's, from its sampling parameters.

    Raises:
        InvalidRequestError: no seed: the stream could not go on with the same random numbers.
    """
    if seed is None:
        raise InvalidRequestError.of("resume.seed", "the seed of the interrupted stream is needed")
    return types_pb2.Resume(
        generated_token_ids=pack_token_ids(resume.generated_tokens),
        invocation_start=resume.invocation_start,
        adapter_digest=resume.adapter_digest,
        model_digest=resume.model_digest,
        seed=seed,
    )
