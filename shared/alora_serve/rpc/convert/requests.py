"""Whole requests and answers of the RPCs, put together from their parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from alora_serve.rpc.convert.events import timings_from_proto, timings_to_proto, usage_from_proto, usage_to_proto
from alora_serve.rpc.convert.names import check_adapter_name
from alora_serve.rpc.convert.prompt import (
    handle_from_proto,
    handle_to_proto,
    prompt_from_proto,
    prompt_to_proto,
    read_prompt,
)
from alora_serve.rpc.convert.sampling import (
    MAX_SAMPLES,
    read_resume,
    read_sampling,
    resume_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from alora_serve.rpc.convert.text import sendable_texts
from alora_serve.rpc.convert.violations import Violations
from alora_serve.types import GenerateRequest, PrefillResult, Prompt, Resume, SamplingParams
from alora_serve.v1 import adapter_decode_pb2, alora_pb2, base_prefill_pb2

MAX_FAN_OUT_TARGETS: Final = 256


@dataclass(frozen=True, slots=True)
class Target:
    """Who continues a prompt, and how.

    Attributes:
        adapter: its name; empty is the base model.
        sampling: how it chooses tokens; of a resumed stream with that stream's seed.
        resume: where its interrupted stream stood.
        is_skipped: it has ended before, and keeps the position of others in a fan-out that goes on.
    """

    adapter: str
    sampling: SamplingParams
    resume: Resume | None = None
    is_skipped: bool = False


@dataclass(frozen=True, slots=True)
class FanOut:
    """One prompt and everyone who continues it. Each target's ``sample_index`` is its position."""

    prompt: Prompt
    targets: tuple[Target, ...]


def generate_from_proto(request: alora_pb2.GenerateRequest) -> tuple[Prompt, tuple[Target, ...]]:
    """What to continue, and with what: a target for each sample, whose ``sample_index`` is its position.

    Raises:
        InvalidRequestError: with every bad field of the request.
    """
    violations = Violations()
    prompt = read_prompt(request.prompt, violations, field="prompt")
    sampling = read_sampling(request.sampling, violations, field="sampling", max_samples=MAX_SAMPLES)
    check_adapter_name(request.adapter, violations, "adapter")
    check_turn_to_answer(prompt, [request.adapter], violations)
    if sampling.n > 1 or request.interrupted_samples:
        samples = _read_samples(request, sampling, violations)
    else:
        samples = (Target(request.adapter, *_read_resume(request, sampling, violations, field="resume")),)
    violations.raise_if_any()
    return prompt, samples


def _read_samples(
    request: alora_pb2.GenerateRequest, sampling: SamplingParams, violations: Violations
) -> tuple[Target, ...]:
    violations.require(not request.HasField("resume"), "resume", "is of one sample; set interrupted_samples instead")
    count = min(sampling.n, MAX_SAMPLES)
    interrupted = list(request.interrupted_samples) or [alora_pb2.InterruptedSample()] * count
    violations.require(
        len(interrupted) == count, "interrupted_samples", f"{len(interrupted)} of them are not one for each of {count}"
    )
    samples = []
    for index, sample in enumerate(interrupted[:count]):
        own = dataclasses.replace(sampling, n=1, sample_index=index)
        field = f"interrupted_samples[{index}].resume"
        samples.append(Target(request.adapter, *_read_resume(sample, own, violations, field=field), sample.skip))
    return tuple(samples)


@sendable_texts("adapter")
def generate_to_proto(prompt: Prompt, target: Target) -> alora_pb2.GenerateRequest:
    """The public request."""
    return alora_pb2.GenerateRequest(
        prompt=prompt_to_proto(prompt), adapter=target.adapter, sampling=sampling_to_proto(target.sampling)
    )


def fan_out_from_proto(request: alora_pb2.FanOutRequest) -> FanOut:
    """The prompt and its targets, each with its own sampling parameters or the common ones.

    Raises:
        InvalidRequestError: with every bad field of the request.
    """
    violations = Violations()
    prompt = read_prompt(request.prompt, violations, field="prompt")
    count = len(request.targets)
    violations.require(
        1 <= count <= MAX_FAN_OUT_TARGETS, "targets", f"{count} targets are not 1 to {MAX_FAN_OUT_TARGETS}"
    )
    check_turn_to_answer(prompt, [target.adapter for target in request.targets], violations)
    common = read_sampling(request.sampling, violations, field="sampling")
    targets = []
    for index, target in enumerate(request.targets[:MAX_FAN_OUT_TARGETS]):
        check_adapter_name(target.adapter, violations, f"targets[{index}].adapter")
        sampling = (
            read_sampling(target.sampling, violations, field=f"targets[{index}].sampling")
            if target.HasField("sampling")
            else common
        )
        sampling, resume = _read_resume(target, sampling, violations, field=f"targets[{index}].resume")
        sampling = dataclasses.replace(sampling, sample_index=index)
        targets.append(Target(target.adapter, sampling, resume, target.skip))
    violations.raise_if_any()
    return FanOut(prompt, tuple(targets))


def _read_resume(
    request: alora_pb2.GenerateRequest
    | alora_pb2.InterruptedSample
    | alora_pb2.FanOutTarget
    | adapter_decode_pb2.DecodeRequest,
    sampling: SamplingParams,
    violations: Violations,
    *,
    field: str,
) -> tuple[SamplingParams, Resume | None]:
    """Where a request's interrupted stream stood, and its sampling parameters with that stream's seed."""
    if not request.HasField("resume"):
        return sampling, None
    seed = request.resume.seed
    violations.require(sampling.seed in (None, seed), f"{field}.seed", f"{seed} is not sampling.seed {sampling.seed}")
    resume = read_resume(request.resume, sampling.most_tokens, violations, field=field)
    return dataclasses.replace(sampling, seed=seed), resume


@sendable_texts("targets")
def fan_out_to_proto(fan_out: FanOut) -> alora_pb2.FanOutRequest:
    """The public request, with every target's sampling parameters spelt out."""
    return alora_pb2.FanOutRequest(
        prompt=prompt_to_proto(fan_out.prompt),
        targets=[
            alora_pb2.FanOutTarget(adapter=target.adapter, sampling=sampling_to_proto(target.sampling))
            for target in fan_out.targets
        ],
    )


def check_turn_to_answer(prompt: Prompt, adapters: Sequence[str], violations: Violations) -> None:
    """The base model has nothing to say to its own turn; an adapter may well judge it."""
    if prompt.messages and prompt.messages[-1].role == "assistant" and "" in adapters:
        path = f"prompt.messages[{len(prompt.messages) - 1}].role"
        violations.add(path, "the base model can't answer an assistant's turn: name an adapter, or add a turn")


@sendable_texts("name")
def load_adapter_to_proto(name: str) -> alora_pb2.LoadAdapterRequest:
    """What asks for an adapter to be loaded."""
    return alora_pb2.LoadAdapterRequest(name=name)


@sendable_texts("name")
def unload_adapter_to_proto(name: str) -> alora_pb2.UnloadAdapterRequest:
    """What asks for an adapter to be dropped."""
    return alora_pb2.UnloadAdapterRequest(name=name)


def adapter_name_from_proto(
    request: alora_pb2.LoadAdapterRequest
    | alora_pb2.UnloadAdapterRequest
    | adapter_decode_pb2.AdapterDecodeServiceLoadAdapterRequest
    | adapter_decode_pb2.AdapterDecodeServiceUnloadAdapterRequest
    | adapter_decode_pb2.AdapterDecodeServiceGetIntrinsicRequest,
) -> str:
    """The adapter that the request is about.

    Raises:
        InvalidRequestError: none is named, or none can have that name.
    """
    violations = Violations()
    violations.require(request.name != "", "name", "is empty; name an adapter as ListAdapters does")
    check_adapter_name(request.name, violations, "name")
    violations.raise_if_any()
    return request.name


def prefill_from_proto(request: alora_pb2.PrefillRequest | base_prefill_pb2.BasePrefillServicePrefillRequest) -> Prompt:
    """The prompt of a public or internal prefill.

    Raises:
        InvalidRequestError: with every bad field of the request.
    """
    return prompt_from_proto(request.prompt)


def prefill_result_to_proto(result: PrefillResult) -> alora_pb2.PrefillResponse:
    """The public answer of a prefill."""
    return alora_pb2.PrefillResponse(
        handle=handle_to_proto(result.handle),
        usage=usage_to_proto(result.usage),
        timings=timings_to_proto(result.timings),
    )


def prefill_result_to_internal_proto(result: PrefillResult) -> base_prefill_pb2.BasePrefillServicePrefillResponse:
    """The internal answer of a prefill."""
    return base_prefill_pb2.BasePrefillServicePrefillResponse(
        handle=handle_to_proto(result.handle),
        usage=usage_to_proto(result.usage),
        timings=timings_to_proto(result.timings),
    )


def prefill_result_from_proto(
    response: alora_pb2.PrefillResponse | base_prefill_pb2.BasePrefillServicePrefillResponse,
) -> PrefillResult:
    """The answer of a prefill, public or internal.

    Raises:
        InvalidRequestError: a handle that is malformed.
    """
    return PrefillResult(
        handle=handle_from_proto(response.handle),
        usage=usage_from_proto(response.usage),
        timings=timings_from_proto(response.timings),
    )


def decode_from_proto(request: adapter_decode_pb2.DecodeRequest) -> GenerateRequest:
    """What a worker is to generate. A resumed stream goes on with the seed it had.

    Raises:
        InvalidRequestError: with the bad fields of the handle, the sampling parameters or what is beside them.
    """
    sampling = sampling_from_proto(request.sampling, sample_index=request.sample_index)
    violations = Violations()
    check_adapter_name(request.adapter, violations, "adapter")
    sampling, resume = _read_resume(request, sampling, violations, field="resume")
    violations.raise_if_any()
    return GenerateRequest(
        handle=handle_from_proto(request.handle),
        adapter=request.adapter,
        sampling=sampling,
        resume=resume,
        request_id=request.request_id,
        tenant=request.tenant,
        skip_store=request.skip_store,
        is_taken_over=request.taken_over,
    )


def decode_to_proto(request: GenerateRequest, *, attempt: int = 0) -> adapter_decode_pb2.DecodeRequest:
    """The request to a worker.

    Raises:
        InvalidRequestError: a resume point without a seed.
    """
    return adapter_decode_pb2.DecodeRequest(
        handle=handle_to_proto(request.handle),
        adapter=request.adapter,
        sampling=sampling_to_proto(request.sampling),
        sample_index=request.sampling.sample_index,
        resume=resume_to_proto(request.resume, request.sampling.seed) if request.resume else None,
        request_id=request.request_id,
        attempt=attempt,
        tenant=request.tenant,
        skip_store=request.skip_store,
        taken_over=request.is_taken_over,
    )
