"""What is out of range, contradictory or not served is refused with the exact paths, all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from alora_serve.errors import InvalidRequestError
from alora_serve.rpc import convert
from alora_serve.v1 import adapter_decode_pb2, alora_pb2, types_pb2

USER = types_pb2.Message(role="user", content="hi")
ASSISTANT = types_pb2.Message(role="assistant", content="hello")
HANDLE = types_pb2.PrefixHandle(kind=types_pb2.PROMPT_KIND_CONVERSATION)
TOKENS = b"\1\0\0\0"


def fields(error: InvalidRequestError) -> list[str]:
    return [violation.field for violation in error.violations]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("default_max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-39),
        ("repetition_penalty", 0.0099),
        ("repetition_penalty", 100.5),
        ("repetition_penalty", 1e38),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.5),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.5),
        ("frequency_penalty", math.inf),
        ("stop", ["x"] * 17),
    ],
)
def test_a_sampling_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.sampling_from_proto(types_pb2.SamplingParams(**{name: value}))
    assert fields(caught.value) == [f"sampling.{name}"]


@pytest.mark.parametrize("bias", [100.5, -101.0, math.nan, math.inf])
def test_a_logit_bias_out_of_range_is_named_by_token(bias: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.sampling_from_proto(types_pb2.SamplingParams(logit_bias={3: 1.0, 7: bias}))
    assert fields(caught.value) == ["sampling.logit_bias[7]"]


@pytest.mark.parametrize("stop", ["", "x" * 1025])
def test_a_stop_string_that_is_empty_or_too_long_is_named_by_position(stop: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.sampling_from_proto(types_pb2.SamplingParams(stop=["a", stop]))
    assert fields(caught.value) == ["sampling.stop[1]"]


def test_the_edges_of_every_range_are_inside() -> None:
    convert.sampling_from_proto(
        types_pb2.SamplingParams(
            max_tokens=1,
            temperature=100,
            top_p=1,
            min_p=0,
            repetition_penalty=100,
            presence_penalty=-2,
            frequency_penalty=2,
            logit_bias={0: -100, 1: 100},
            stop=["x" * 1024] * 16,
            n=1,
        )
    )
    convert.sampling_from_proto(types_pb2.SamplingParams(repetition_penalty=0.01))


FORM = "sampling.structured_output"


@pytest.mark.parametrize(
    ("form", "bad", "why"),
    [
        ({}, [FORM], "no form"),
        ({"json_schema": " "}, [f"{FORM}.json_schema"] * 2, "is empty"),
        ({"json_schema": '{"a"'}, [f"{FORM}.json_schema"], "is not JSON"),
        ({"json_schema": '{"minimum": NaN}'}, [f"{FORM}.json_schema"], "NaN is no JSON"),
        ({"json_schema": "[]"}, [f"{FORM}.json_schema"], "not a JSON object"),
        ({"json_schema": '{"a":' * 64 + "1" + "}" * 64}, [f"{FORM}.json_schema"], "65 levels is more than 64"),
        ({"json_schema": "[" * 50_000}, [f"{FORM}.json_schema"], "nested too deeply"),
        ({"json_schema": f'{{"title": "{"x" * 131072}"}}'}, [f"{FORM}.json_schema"], "bytes are more than 131072"),
        ({"regex": ""}, [f"{FORM}.regex"], "is empty"),
        ({"grammar": ""}, [f"{FORM}.grammar"], "is empty"),
        ({"choice": types_pb2.Choice()}, [f"{FORM}.choice.values"], "0 choices are not 1 to 1024"),
        ({"choice": types_pb2.Choice(values=["a", ""])}, [f"{FORM}.choice.values[1]"], "is empty"),
        ({"choice": types_pb2.Choice(values=["a", "b", "a"])}, [f"{FORM}.choice.values"], "'a' is given 2 times"),
        (
            {"choice": types_pb2.Choice(values=map(str, range(1025)))},
            [f"{FORM}.choice.values"],
            "1025 choices are not 1 to 1024",
        ),
    ],
)
def test_a_form_that_no_worker_needs_to_see_is_refused(form: dict[str, Any], bad: list[str], why: str) -> None:
    message = types_pb2.SamplingParams(structured_output=types_pb2.StructuredOutput(**form))
    with pytest.raises(InvalidRequestError, match=why) as caught:
        convert.sampling_from_proto(message)
    assert fields(caught.value) == bad


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (types_pb2.SamplingParams(top_logprobs=21), "sampling.top_logprobs"),
        (types_pb2.SamplingParams(n=65), "sampling.n"),
        (
            types_pb2.SamplingParams(ignore_eos=True, structured_output=types_pb2.StructuredOutput(regex="a")),
            "sampling.ignore_eos",
        ),
    ],
)
def test_what_is_too_much_of_a_sampling_parameter_is_named(message: types_pb2.SamplingParams, field: str) -> None:
    request = alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(token_ids=TOKENS), sampling=message)
    with pytest.raises(InvalidRequestError) as caught:
        convert.generate_from_proto(request)
    assert fields(caught.value) == [field]


def test_samples_are_for_generate_alone() -> None:
    several = types_pb2.SamplingParams(n=2)
    target = alora_pb2.FanOutTarget(sampling=several)
    fan_out = alora_pb2.FanOutRequest(prompt=types_pb2.Prompt(token_ids=TOKENS), targets=[target], sampling=several)
    with pytest.raises(InvalidRequestError, match="a target several times") as caught:
        convert.fan_out_from_proto(fan_out)
    assert fields(caught.value) == ["sampling.n", "targets[0].sampling.n"]
    with pytest.raises(InvalidRequestError, match=r"sampling\.n"):
        convert.decode_from_proto(adapter_decode_pb2.DecodeRequest(handle=HANDLE, sampling=several))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"resume": types_pb2.Resume()}, "resume"),
        ({"interrupted_samples": [alora_pb2.InterruptedSample()]}, "interrupted_samples"),
        (
            {"interrupted_samples": [alora_pb2.InterruptedSample(resume=types_pb2.Resume(seed=2))] * 2},
            "interrupted_samples[0].resume.seed",
        ),
    ],
)
def test_where_samples_stood_is_told_of_each(changes: dict[str, Any], field: str) -> None:
    request = alora_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(token_ids=TOKENS), sampling=types_pb2.SamplingParams(n=2, seed=1), **changes
    )
    with pytest.raises(InvalidRequestError) as caught:
        convert.generate_from_proto(request)
    assert fields(caught.value)[0] == field


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, ["prompt"]),
        ({"token_ids": TOKENS, "messages": [USER]}, ["prompt.token_ids"]),
        ({"token_ids": TOKENS, "handle": HANDLE}, ["prompt.token_ids"]),
        ({"text": "x", "messages": [USER]}, ["prompt.text"]),
        ({"text": "x", "token_ids": TOKENS}, ["prompt.token_ids", "prompt.text"]),
        ({"token_ids": b"\1\0\0"}, ["prompt.token_ids"]),
        (
            {"token_ids": TOKENS, "documents": [types_pb2.Document(text="d")], "tools_json": ["{}"]},
            ["prompt.documents", "prompt.tools_json"],
        ),
        ({"token_ids": TOKENS, "template_arguments_json": "{}"}, ["prompt.template_arguments_json"]),
        ({"handle": HANDLE, "template_arguments_json": "{}"}, ["prompt.template_arguments_json"]),
        ({"handle": HANDLE, "messages": [USER], "documents": [types_pb2.Document(text="d")]}, ["prompt.documents"]),
        ({"handle": HANDLE, "messages": [USER], "tools_json": ["{}"]}, ["prompt.tools_json"]),
        ({"handle": types_pb2.PrefixHandle()}, ["prompt.handle.kind"]),
        (
            {"handle": types_pb2.PrefixHandle(kind=types_pb2.PROMPT_KIND_TOKENS, prefix_token_ids=b"1")},
            ["prompt.handle.prefix_token_ids"],
        ),
        ({"messages": [USER, types_pb2.Message(role="robot")]}, ["prompt.messages[1].role"]),
        ({"messages": [types_pb2.Message()]}, ["prompt.messages[0].role"]),
        ({"messages": [types_pb2.Message(role="document ")]}, ["prompt.messages[0].role"]),
        (
            {"messages": [types_pb2.Message(role="user", tool_calls=[types_pb2.ToolCall(arguments_json="{}")])]},
            ["prompt.messages[0].tool_calls"],
        ),
        *[
            (
                {
                    "messages": [
                        types_pb2.Message(role="assistant", tool_calls=[types_pb2.ToolCall(arguments_json=bad)])
                    ]
                },
                ["prompt.messages[0].tool_calls[0].arguments_json"],
            )
            for bad in ("", "[1]", "{", "[" * 100_000)
        ],
    ],
)
def test_a_prompt_that_contradicts_itself_is_refused(parts: Mapping[str, Any], expected: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.prompt_from_proto(types_pb2.Prompt(**parts))
    assert fields(caught.value) == expected


def test_everything_wrong_with_a_request_is_told_at_once() -> None:
    request = alora_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(messages=[types_pb2.Message(role="robot")]),
        sampling=types_pb2.SamplingParams(temperature=-1, top_p=0, max_tokens=0, n=2),
    )
    with pytest.raises(InvalidRequestError, match="and 1 more") as caught:
        convert.generate_from_proto(request)
    assert fields(caught.value) == [
        "prompt.messages[0].role",
        "sampling.max_tokens",
        "sampling.temperature",
        "sampling.top_p",
    ]


def test_the_base_model_does_not_answer_an_assistants_turn_but_an_adapter_may_judge_it() -> None:
    prompt = types_pb2.Prompt(messages=[USER, ASSISTANT])
    convert.generate_from_proto(alora_pb2.GenerateRequest(prompt=prompt, adapter="certainty"))
    with pytest.raises(InvalidRequestError) as caught:
        convert.generate_from_proto(alora_pb2.GenerateRequest(prompt=prompt))
    assert fields(caught.value) == ["prompt.messages[1].role"]
    targets = [alora_pb2.FanOutTarget(adapter=name) for name in ("certainty", "", "")]
    with pytest.raises(InvalidRequestError) as caught:
        convert.fan_out_from_proto(alora_pb2.FanOutRequest(prompt=prompt, targets=targets))
    assert fields(caught.value) == ["prompt.messages[1].role"]
    convert.prefill_from_proto(alora_pb2.PrefillRequest(prompt=prompt))


@pytest.mark.parametrize("count", [0, 257])
def test_a_fan_out_of_none_or_too_many_is_refused(count: int) -> None:
    request = alora_pb2.FanOutRequest(
        prompt=types_pb2.Prompt(token_ids=TOKENS), targets=[alora_pb2.FanOutTarget(adapter="a")] * count
    )
    with pytest.raises(InvalidRequestError, match=f"{count} targets") as caught:
        convert.fan_out_from_proto(request)
    assert fields(caught.value) == ["targets"]


def test_a_targets_own_sampling_is_named_by_position() -> None:
    request = alora_pb2.FanOutRequest(
        prompt=types_pb2.Prompt(token_ids=TOKENS),
        targets=[
            alora_pb2.FanOutTarget(adapter="a"),
            alora_pb2.FanOutTarget(adapter="b", sampling=types_pb2.SamplingParams(top_p=0)),
        ],
    )
    with pytest.raises(InvalidRequestError) as caught:
        convert.fan_out_from_proto(request)
    assert fields(caught.value) == ["targets[1].sampling.top_p"]


def test_a_resume_with_another_seed_than_the_request_is_named() -> None:
    request = alora_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(token_ids=TOKENS),
        sampling=types_pb2.SamplingParams(seed=1),
        resume=types_pb2.Resume(generated_token_ids=TOKENS, seed=2),
    )
    with pytest.raises(InvalidRequestError) as caught:
        convert.generate_from_proto(request)
    assert fields(caught.value) == ["resume.seed"]


@pytest.mark.parametrize(("tokens", "why"), [(0, "has no tokens"), (4, "4 tokens are more than max_tokens 3")])
def test_a_resume_of_nothing_or_of_more_than_was_asked_for_is_refused(tokens: int, why: str) -> None:
    request = alora_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(token_ids=TOKENS),
        sampling=types_pb2.SamplingParams(max_tokens=3),
        resume=types_pb2.Resume(generated_token_ids=TOKENS * tokens),
    )
    with pytest.raises(InvalidRequestError, match=why) as caught:
        convert.generate_from_proto(request)
    assert fields(caught.value) == ["resume.generated_token_ids"]


def test_loading_and_unloading_no_adapter_is_refused() -> None:
    for request in (alora_pb2.LoadAdapterRequest(), alora_pb2.UnloadAdapterRequest()):
        with pytest.raises(InvalidRequestError) as caught:
            convert.adapter_name_from_proto(request)
        assert fields(caught.value) == ["name"]


HANDLED = {"handle": HANDLE}
PROMPT = {"prompt": types_pb2.Prompt(messages=[USER])}
LONG = "ä" * 127 + "x"
"""As many bytes as a folder's name may have."""


@pytest.mark.parametrize(
    ("request_of", "parse", "field"),
    [
        (lambda n: alora_pb2.GenerateRequest(adapter=n, **PROMPT), convert.generate_from_proto, "adapter"),
        (
            lambda n: alora_pb2.FanOutRequest(targets=[alora_pb2.FanOutTarget(adapter=n)], **PROMPT),
            convert.fan_out_from_proto,
            "targets[0].adapter",
        ),
        (
            lambda n: alora_pb2.ScoreRequest(adapter=n, continuations=["a"], **PROMPT),
            convert.scoring_from_proto,
            "adapter",
        ),
        (
            lambda n: alora_pb2.RunIntrinsicRequest(intrinsic=n, **PROMPT),
            convert.run_intrinsic_from_proto,
            "intrinsic",
        ),
        (
            lambda n: alora_pb2.RunIntrinsicsRequest(intrinsics=["a", n], **PROMPT),
            convert.run_intrinsics_from_proto,
            "intrinsics[1]",
        ),
        (lambda n: alora_pb2.LoadAdapterRequest(name=n), convert.adapter_name_from_proto, "name"),
        (lambda n: alora_pb2.UnloadAdapterRequest(name=n), convert.adapter_name_from_proto, "name"),
        (lambda n: adapter_decode_pb2.DecodeRequest(adapter=n, **HANDLED), convert.decode_from_proto, "adapter"),
        (
            lambda n: adapter_decode_pb2.AdapterDecodeServiceScoreRequest(adapter=n, continuations=["a"], **HANDLED),
            convert.score_from_proto,
            "adapter",
        ),
    ],
)
def test_an_adapter_is_named_as_a_folder_can_be_and_no_longer(
    request_of: Callable[[str], Any], parse: Callable[[Any], object], field: str
) -> None:
    parse(request_of(LONG))
    for name in (LONG + "y", "x" * 400_000):
        with pytest.raises(InvalidRequestError) as caught:
            parse(request_of(name))
        assert fields(caught.value) == [field]
        assert len(str(caught.value)) < 200, "it is not repeated"


def test_a_long_name_inside_a_request_is_told_by_its_beginning() -> None:
    request = alora_pb2.RunIntrinsicRequest(prompt=types_pb2.Prompt(messages=[USER]), intrinsic="a")
    request.parameters.update({"x" * 400_000: [math.nan] * 2})
    with pytest.raises(InvalidRequestError) as caught:
        convert.run_intrinsic_from_proto(request)
    assert fields(caught.value) == [f"parameters.{'x' * 60}…[{index}]" for index in range(2)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON"),
        ('{"a": 1e400}', "a number is beyond"),
        ('{"a": 1' + "0" * 400 + "}", "a number is beyond"),
        (r'{"a": "\ud800"}', "is not JSON"),
        (r'{"\ud800": 1}', "is not JSON"),
        ('{"a":' + "[" * 31 + "]" * 31 + "}", "more than 30 lists and objects in one another"),
        ("[" * 100_000, "more than 30 lists and objects in one another"),
    ],
    ids=lambda value: value[:24],
)
def test_json_for_the_chat_template_is_refused_by_its_field_if_no_reader_would_take_it(text: str, problem: str) -> None:
    prompt = types_pb2.Prompt(messages=[USER], tools_json=["{}", text], template_arguments_json=text)
    with pytest.raises(InvalidRequestError) as caught:
        convert.prompt_from_proto(prompt)
    told = {violation.field: violation.description for violation in caught.value.violations}
    assert told.keys() == {"prompt.tools_json[1]"} | ({"prompt.template_arguments_json"} if text else set())
    assert all(problem in description for description in told.values())


def test_a_choice_given_twice_is_told_by_its_beginning() -> None:
    form = types_pb2.StructuredOutput(choice=types_pb2.Choice(values=["x" * 60_000] * 2))
    with pytest.raises(InvalidRequestError, match="is given 2 times") as caught:
        convert.sampling_from_proto(types_pb2.SamplingParams(structured_output=form))
    assert len(str(caught.value)) < 300


def test_a_resume_point_that_is_not_whole_tokens_is_named() -> None:
    bad = types_pb2.Resume(generated_token_ids=b"abc")
    with pytest.raises(InvalidRequestError, match=r"resume\.generated_token_ids"):
        convert.decode_from_proto(adapter_decode_pb2.DecodeRequest(handle=HANDLE, resume=bad))
    target = alora_pb2.FanOutTarget(resume=bad)
    with pytest.raises(InvalidRequestError, match=r"targets\[0\]\.resume\.generated_token_ids"):
        convert.fan_out_from_proto(alora_pb2.FanOutRequest(prompt=types_pb2.Prompt(token_ids=TOKENS), targets=[target]))
