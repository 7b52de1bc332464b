"""Everything that crosses the wire comes back as it was."""

from __future__ import annotations

import dataclasses
import json
import math
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_serve.errors import AloraServeError, IntrinsicOutputError, InvalidRequestError
from alora_serve.rpc import convert
from alora_serve.rpc.convert.intrinsics import MAX_NESTING
from alora_serve.rpc.convert.json_text import MAX_JSON_NESTING
from alora_serve.types import (
    AdapterDigest,
    AdapterInfo,
    ChatMessage,
    Choice,
    Document,
    EndpointStatus,
    Finished,
    FinishReason,
    GenerateRequest,
    Grammar,
    Heartbeat,
    IntrinsicResult,
    IntrinsicRun,
    JsonSchema,
    ModelInfo,
    PrefillResult,
    PrefixDigest,
    PrefixHandle,
    Prompt,
    PromptKind,
    Regex,
    Resume,
    SamplingParams,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    TokenLogprob,
    ToolCall,
    Usage,
)
from alora_serve.v1 import adapter_decode_pb2, alora_pb2, base_prefill_pb2, types_pb2

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
text = st.text(max_size=8)
seconds = st.floats(0, 1e6)
logprobs = st.floats(-(2.0**100), 0, width=32).map(float)
digest = st.binary(min_size=32, max_size=32)
adapter_digest = text.map(AdapterDigest)
token_ids = st.lists(uint32, max_size=6).map(tuple)
resumes = st.builds(Resume, token_ids.filter(bool), st.none() | uint32, adapter_digest)
counts = st.dictionaries(text, uint32, max_size=3)


def float32(low: float, high: float, **kwargs: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, **kwargs)


handles = st.builds(
    PrefixHandle,
    digest,
    digest,
    token_ids,
    token_ids,
    st.sampled_from(PromptKind),
    text,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    digest,
)
usages = st.builds(Usage, uint32, uint32, uint32, uint32, uint32, uint64, uint64, st.none() | uint32, counts, counts)
timings = st.builds(Timings, *[seconds] * 7)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**32 - 1),
    default_max_tokens=st.integers(1, 2**32 - 1),
    temperature=float32(0, 100),
    top_p=float32(0, 1, exclude_min=True),
    top_k=uint32,
    min_p=float32(0, 1, exclude_max=True),
    repetition_penalty=float32(0.015625, 100),
    presence_penalty=float32(-2, 2),
    frequency_penalty=float32(-2, 2),
    logit_bias=st.dictionaries(uint32, float32(-100, 100), max_size=3),
    seed=st.none() | uint64,
    stop=st.lists(st.text(min_size=1, max_size=4), max_size=16).map(tuple),
    stop_token_ids=token_ids,
    ignore_eos=st.booleans(),
    logprobs=st.booleans(),
    structured_output=st.none()
    | st.sampled_from([JsonSchema("{}"), JsonSchema("true"), Regex("a|b"), Grammar('start: "a"')])
    | st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=3, unique=True).map(tuple).map(Choice),
).map(lambda params: dataclasses.replace(params, ignore_eos=params.ignore_eos and params.structured_output is None))
samplings_with_likely_tokens = st.tuples(samplings, st.integers(1, 20)).map(
    lambda pair: dataclasses.replace(pair[0], logprobs=True, top_logprobs=pair[1])
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.just(0.5) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(text, json_values, max_size=3)
tool_calls = st.builds(ToolCall, text, text, st.sampled_from(["{}", '{"city": "Bern"}']))
messages = st.builds(
    ChatMessage, st.sampled_from(["system", "user", "tool"]), text, st.just(()), text, text
) | st.builds(ChatMessage, st.just("assistant"), text, st.lists(tool_calls, max_size=2).map(tuple), text, text)
some_messages = st.lists(messages, min_size=1, max_size=3).map(tuple)
prompts = (
    st.builds(
        Prompt,
        messages=some_messages,
        documents=st.lists(st.builds(Document, text, text, text), max_size=2).map(tuple),
        template_arguments=json_objects,
        tools=st.lists(json_objects, max_size=2).map(tuple),
    )
    | st.builds(Prompt, messages=some_messages, handle=handles, template_arguments=json_objects)
    | st.builds(Prompt, token_ids=token_ids.filter(bool))
    | st.builds(Prompt, text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
    | st.builds(Prompt, handle=handles)
)
answerable = prompts.filter(lambda prompt: not prompt.messages or prompt.messages[-1].role != "assistant")
events = (
    st.builds(Started, adapter_digest, st.none() | uint32, uint64, uint32)
    | st.builds(
        TokenChunk,
        token_ids,
        text,
        st.lists(logprobs, max_size=3).map(tuple),
        st.lists(st.binary(max_size=3), max_size=3).map(tuple),
        st.lists(
            st.lists(st.builds(TokenLogprob, uint32, logprobs, st.binary(max_size=3)), max_size=3).map(tuple),
            max_size=3,
        ).map(tuple),
    )
    | st.builds(Finished, st.sampled_from(FinishReason), usages, timings, text, text, st.none() | handles)
    | st.builds(Heartbeat)
)
adapters = st.builds(
    AdapterInfo,
    text,
    adapter_digest,
    st.sampled_from(["alora", "lora", ""]),
    uint32,
    st.lists(text, max_size=3).map(tuple),
    token_ids,
    text,
    uint64,
    st.booleans(),
    text,
)
models = st.builds(ModelInfo, text, digest, digest, text, text, uint32, uint32, uint32, uint64)
statuses = st.builds(
    EndpointStatus,
    models,
    st.booleans(),
    uint32,
    uint32,
    uint32,
    seconds,
    uint64,
    seconds,
    seconds,
    st.lists(adapters, max_size=2).map(tuple),
    uint64,
    seconds,
    seconds,
    st.builds(PrefixDigest, uint32, st.frozensets(uint64, max_size=3)),
)


@given(token_ids)
def test_token_ids(ids: tuple[int, ...]) -> None:
    packed = convert.pack_token_ids(ids)
    assert convert.unpack_token_ids(packed, "x") == ids
    assert packed == b"".join(token.to_bytes(4, "little") for token in ids)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_token_ids_that_are_not_whole(length: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{length} bytes") as caught:
        convert.unpack_token_ids(b"\0" * length, "prompt.token_ids")
    assert caught.value.violations[0].field == "prompt.token_ids"


@given(handles)
def test_handles(handle: PrefixHandle) -> None:
    assert convert.handle_from_proto(convert.handle_to_proto(handle)) == handle


@given(prompts)
def test_prompts(prompt: Prompt) -> None:
    assert convert.prompt_from_proto(convert.prompt_to_proto(prompt)) == prompt


@given(samplings)
def test_sampling_params(params: SamplingParams) -> None:
    assert convert.sampling_from_proto(convert.sampling_to_proto(params)) == params


def test_unset_sampling_params_are_the_defaults() -> None:
    assert convert.sampling_from_proto(types_pb2.SamplingParams()) == SamplingParams()


@given(usages)
def test_usage(usage: Usage) -> None:
    assert convert.usage_from_proto(convert.usage_to_proto(usage)) == usage


@given(timings)
def test_timings(values: Timings) -> None:
    assert convert.timings_from_proto(convert.timings_to_proto(values)) == values


@given(events, uint32, uint32)
def test_events_with_their_attempt_and_place(event: StreamEvent, attempt: int, first_index: int) -> None:
    message = convert.event_to_proto(event, attempt=attempt, first_index=first_index)
    assert convert.event_from_proto(message) == event
    assert message.attempt == attempt
    assert not isinstance(event, TokenChunk) or message.chunk.first_index == first_index


def test_an_event_of_a_later_version_shows_that_the_stream_lives() -> None:
    assert convert.event_from_proto(types_pb2.GenerationEvent(attempt=1)) == Heartbeat()


def test_a_finish_reason_of_a_later_version_is_an_error_that_names_it() -> None:
    message = types_pb2.GenerationEvent()
    message.finished.finish_reason = 9  # type: ignore[assignment]
    with pytest.raises(AloraServeError, match="reason 9"):
        convert.event_from_proto(message)


@given(adapters)
def test_adapters(adapter: AdapterInfo) -> None:
    assert convert.adapter_from_proto(convert.adapter_to_proto(adapter)) == adapter


@given(models)
def test_models(model: ModelInfo) -> None:
    assert convert.model_from_proto(convert.model_to_proto(model)) == model


@given(statuses)
def test_endpoint_statuses(status: EndpointStatus) -> None:
    assert convert.endpoint_status_from_proto(convert.endpoint_status_to_proto(status)) == status


def test_a_status_of_an_earlier_version_leaves_the_newer_figures_unknown() -> None:
    status = convert.endpoint_status_from_proto(types_pb2.EndpointStatus(running=3))
    assert (status.running, status.adapter_load_seconds, status.sequence_seconds) == (3, 0, 0)
    assert status.resident_prefixes == PrefixDigest()


@given(answerable, text, samplings)
def test_generate_requests(prompt: Prompt, adapter: str, sampling: SamplingParams) -> None:
    target = convert.Target(adapter, sampling)
    assert convert.generate_from_proto(convert.generate_to_proto(prompt, target)) == (prompt, (target,))


@given(samplings_with_likely_tokens)
def test_sampling_parameters_with_likely_tokens(params: SamplingParams) -> None:
    assert convert.sampling_from_proto(convert.sampling_to_proto(params)) == params


def test_likely_tokens_imply_the_chosen_ones() -> None:
    assert convert.sampling_from_proto(types_pb2.SamplingParams(top_logprobs=3)).logprobs


@given(st.integers(2, 64))
def test_each_sample_of_a_request_is_a_target_of_its_own(count: int) -> None:
    message = alora_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(token_ids=b"\1\0\0\0"), adapter="a", sampling=types_pb2.SamplingParams(n=count, seed=7)
    )
    _, samples = convert.generate_from_proto(message)
    assert samples == tuple(convert.Target("a", SamplingParams(seed=7, sample_index=index)) for index in range(count))


def test_interrupted_samples_go_on_each_from_where_it_stood() -> None:
    stood = types_pb2.Resume(generated_token_ids=b"\5\0\0\0", seed=7)
    message = alora_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(token_ids=b"\1\0\0\0"),
        sampling=types_pb2.SamplingParams(n=3, seed=7),
        interrupted_samples=[
            alora_pb2.InterruptedSample(skip=True),
            alora_pb2.InterruptedSample(resume=stood),
            alora_pb2.InterruptedSample(),
        ],
    )
    _, samples = convert.generate_from_proto(message)
    assert [sample.is_skipped for sample in samples] == [True, False, False]
    assert [sample.resume.generated_tokens if sample.resume else None for sample in samples] == [None, (5,), None]


@given(answerable, st.lists(st.tuples(text, samplings), min_size=1, max_size=3))
def test_fan_outs(prompt: Prompt, targets: list[tuple[str, SamplingParams]]) -> None:
    fan_out = convert.FanOut(
        prompt,
        tuple(
            convert.Target(adapter, dataclasses.replace(sampling, sample_index=index))
            for index, (adapter, sampling) in enumerate(targets)
        ),
    )
    assert convert.fan_out_from_proto(convert.fan_out_to_proto(fan_out)) == fan_out


def test_targets_without_sampling_take_the_common_one() -> None:
    request = alora_pb2.FanOutRequest(
        prompt=types_pb2.Prompt(token_ids=b"\1\0\0\0"),
        targets=[
            alora_pb2.FanOutTarget(adapter="one"),
            alora_pb2.FanOutTarget(adapter="two", sampling=types_pb2.SamplingParams(max_tokens=7)),
        ],
        sampling=types_pb2.SamplingParams(max_tokens=3),
    )
    targets = convert.fan_out_from_proto(request).targets
    assert [(target.sampling.max_tokens, target.sampling.sample_index) for target in targets] == [(3, 0), (7, 1)]


@given(handles, text, samplings, uint32, st.none() | resumes, st.booleans())
def test_decode_requests(
    handle: PrefixHandle,
    adapter: str,
    sampling: SamplingParams,
    sample_index: int,
    resume: Resume | None,
    is_taken_over: bool,
) -> None:
    sampling = dataclasses.replace(sampling, sample_index=sample_index)
    if resume is not None:
        max_tokens = max(sampling.most_tokens, len(resume.generated_tokens))
        sampling = dataclasses.replace(sampling, seed=sampling.seed or 1, max_tokens=max_tokens)
    request = GenerateRequest(handle, adapter, sampling, resume, "id", is_taken_over=is_taken_over)
    message = convert.decode_to_proto(request, attempt=2)
    assert convert.decode_from_proto(message) == request
    assert message.attempt == 2


def test_a_resumed_stream_goes_on_with_its_seed() -> None:
    message = adapter_decode_pb2.DecodeRequest(
        handle=types_pb2.PrefixHandle(kind=types_pb2.PROMPT_KIND_TOKENS),
        resume=types_pb2.Resume(generated_token_ids=b"\5\0\0\0", seed=5),
    )
    assert convert.decode_from_proto(message).sampling.seed == 5
    message.sampling.seed = 6
    with pytest.raises(InvalidRequestError, match=r"5 is not sampling\.seed 6"):
        convert.decode_from_proto(message)


def test_a_resume_point_without_a_seed_cannot_be_sent() -> None:
    with pytest.raises(InvalidRequestError, match=r"resume\.seed"):
        convert.resume_to_proto(Resume((), None, AdapterDigest("")), None)


@given(handles, usages, timings)
def test_prefill_results(handle: PrefixHandle, usage: Usage, values: Timings) -> None:
    result = PrefillResult(handle, usage, values)
    assert convert.prefill_result_from_proto(convert.prefill_result_to_proto(result)) == result
    assert convert.prefill_result_from_proto(convert.prefill_result_to_internal_proto(result)) == result


@given(prompts)
def test_prefill_requests_public_and_internal(prompt: Prompt) -> None:
    message = convert.prompt_to_proto(prompt)
    assert convert.prefill_from_proto(alora_pb2.PrefillRequest(prompt=message)) == prompt
    internal = base_prefill_pb2.BasePrefillServicePrefillRequest(prompt=message, request_id="id")
    assert convert.prefill_from_proto(internal) == prompt


def sent(prompt: Prompt) -> Prompt:
    """The prompt as a server reads it from the bytes of a request."""
    return convert.prompt_from_proto(types_pb2.Prompt.FromString(convert.prompt_to_proto(prompt).SerializeToString()))


def test_numbers_in_template_values_stay_what_they_are() -> None:
    arguments = {"n": 5, "whole": 5.0, "x": 0.5, "exact": 2**53 + 1, "big": 2.0**1000}
    prompt = Prompt(messages=(ChatMessage("user", "hi"),), template_arguments=arguments)
    assert repr(sent(prompt).template_arguments) == repr(arguments)


@given(st.dictionaries(text, json_values, min_size=20, max_size=40))
def test_tools_and_template_arguments_keep_the_order_of_their_keys(values: dict[str, Any]) -> None:
    prompt = Prompt(messages=(ChatMessage("user", "hi"),), template_arguments={"a": values}, tools=(values,))
    read = sent(prompt)
    assert json.dumps(read.template_arguments["a"]) == json.dumps(values)
    assert json.dumps(read.tools[0]) == json.dumps(values)


def test_mappings_of_any_kind_are_sent() -> None:
    values = MappingProxyType({"b": MappingProxyType({"z": (1,)}), "a": 2})
    prompt = Prompt(messages=(ChatMessage("user", "hi"),), template_arguments=values, tools=(values,))
    read = sent(prompt)
    assert list(read.template_arguments.items()) == [("b", {"z": [1]}), ("a", 2)]
    assert read.tools == (read.template_arguments,)


def test_a_template_value_that_is_not_json_is_named() -> None:
    prompt = Prompt(messages=(ChatMessage("user", "hi"),), template_arguments={"n": object()})
    with pytest.raises(InvalidRequestError, match=r"prompt\.template_arguments_json: is not JSON: object"):
        convert.prompt_to_proto(prompt)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_does_not_have_is_refused(number: float) -> None:
    prompt = types_pb2.Prompt(messages=[types_pb2.Message(role="user", content="hi")])
    message = alora_pb2.RunIntrinsicRequest(prompt=prompt, intrinsic="a")
    message.parameters.update({"a": {"b": [number]}})
    with pytest.raises(InvalidRequestError, match=r"parameters\.a\.b\[0\]"):
        convert.run_intrinsic_from_proto(message)
    with pytest.raises(InvalidRequestError, match=r"prompt\.tools_json\[0\]: is not JSON"):
        convert.prompt_to_proto(Prompt(tools=({"a": number},)))


@given(
    prompts,
    st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
    json_objects,
    st.frozensets(st.integers(0, 2)),
)
def test_runs_of_intrinsics(prompt: Prompt, names: tuple[str, ...], parameters: Any, done: frozenset[int]) -> None:
    run = IntrinsicRun(prompt, names, parameters, done)
    message = convert.run_intrinsics_to_proto(run)
    message.done.extend(done)
    assert convert.run_intrinsics_from_proto(message) == run
    one = IntrinsicRun(prompt, names[:1], parameters)
    assert convert.run_intrinsic_from_proto(convert.run_intrinsic_to_proto(one)) == one


@given(json_values, text, usages, timings, st.dictionaries(text, st.dictionaries(text, st.floats(0, 1))))
def test_results_of_intrinsics(value: Any, raw: str, usage: Usage, took: Timings, probabilities: Any) -> None:
    result = IntrinsicResult(value, raw, usage, took, probabilities)
    assert convert.intrinsic_result_from_proto(convert.intrinsic_result_to_proto(result)) == result


def _nested(levels: int) -> Any:
    return [_nested(levels - 1)] if levels else 0


def test_json_is_asked_with_only_if_everybody_can_read_it() -> None:
    def arguments(value: Any) -> Prompt:
        return Prompt(messages=(ChatMessage("user", "hi"),), template_arguments={"a": value})

    def within(levels: int) -> Any:
        return {"a": within(levels - 1)} if levels else 0

    deep = convert.generate_to_proto(arguments(within(MAX_JSON_NESTING - 1)), convert.Target("", SamplingParams()))
    assert alora_pb2.GenerateRequest.FromString(deep.SerializeToString()) == deep
    for value, problem in (
        (within(MAX_JSON_NESTING), "in one another"),
        (_nested(MAX_JSON_NESTING), "in one another"),
        (_nested(500), "in one another"),
        (10**400, "not JSON"),
        ("\ud800", "not JSON"),
        ({1, 2}, "not JSON"),
    ):
        with pytest.raises(InvalidRequestError, match=problem):
            convert.prompt_to_proto(arguments(value))


def test_a_result_is_sent_only_if_everybody_can_read_it() -> None:
    deep = IntrinsicResult(_nested(MAX_NESTING), "", Usage(), Timings())
    message = alora_pb2.RunIntrinsicsResponse(result=convert.intrinsic_result_to_proto(deep))
    assert alora_pb2.RunIntrinsicsResponse.FromString(message.SerializeToString()) == message
    for value, problem in (
        (_nested(MAX_NESTING + 1), "in one another"),
        ({"a": 10**400}, "number beyond"),
        (["\ud800"], "surrogate"),
        ({"\ud800": 1}, "surrogate"),
    ):
        with pytest.raises(IntrinsicOutputError, match=problem):
            convert.intrinsic_result_to_proto(IntrinsicResult(value, "", Usage(), Timings()))
