"""From what a caller writes to the request it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alora_serve.client.arguments import (
    GenerateFields,
    build_prompt,
    fan_out_request,
    generate_request,
    intrinsic_run,
    prefill_request,
    sample_request,
    score_request,
)
from alora_serve.errors import InvalidRequestError
from alora_serve.rpc import convert
from alora_serve.rpc.convert import Target, fan_out_from_proto, generate_from_proto, prefill_from_proto
from alora_serve.types import ChatMessage, Choice, Document, Prompt, SamplingParams, ToolCall
from fake_services import handle


@pytest.mark.parametrize(
    "messages",
    ["Hi", [{"role": "user", "content": "Hi"}], [ChatMessage("user", "Hi")], ({"role": "user", "content": "Hi"},)],
)
def test_a_conversation_may_be_written_in_several_ways(messages: Any) -> None:
    assert build_prompt(messages, {}) == Prompt(messages=(ChatMessage("user", "Hi"),))


def test_a_message_may_carry_tool_calls() -> None:
    call = {"id": "1", "name": "search", "arguments_json": "{}"}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "1", "name": "search"},
    ]
    assert build_prompt(turns, {}).messages == (
        ChatMessage("assistant", "", (ToolCall("1", "search", "{}"),)),
        ChatMessage("tool", "found", tool_call_id="1", name="search"),
    )
    assert build_prompt([{**turns[0], "tool_calls": [ToolCall(**call)]}], {}).messages[0].tool_calls[0].name == "search"


@pytest.mark.parametrize(
    "message", [{"content": "no role"}, {"role": "user", "text": "x"}, "a string", {"role": "user", "tool_calls": [1]}]
)
def test_what_is_no_message_is_refused_with_its_place(message: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_prompt([{"role": "user", "content": "fine"}, message], {})
    assert caught.value.violations[0].field == "prompt.messages[1]"


def test_every_field_reaches_the_server() -> None:
    fields: GenerateFields = {
        "documents": [Document("t", "text")],
        "tools": [{"name": "search"}],
        "template_arguments": {"date_string": "today"},
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {5: 1.0},
        "seed": 6,
        "stop": ["x"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 2,
        "structured_output": None,
    }
    prompt, [target] = generate_from_proto(generate_request("Hi", "jailbreak", fields))
    assert prompt == Prompt(
        (ChatMessage("user", "Hi"),),
        documents=(Document("t", "text"),),
        template_arguments={"date_string": "today"},
        tools=({"name": "search"},),
    )
    sampling = SamplingParams(
        3,
        0.5,
        0.5,
        4,
        0.25,
        1.5,
        0.5,
        -0.5,
        {5: 1.0},
        6,
        stop=("x",),
        stop_token_ids=(7,),
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
    )
    assert target == Target("jailbreak", sampling)
    # Whoever adds a sampling parameter adds it here, too.
    assert GenerateFields.__optional_keys__ >= set(SamplingParams.__dataclass_fields__) - {"sample_index", "n"}


def test_a_form_reaches_the_server() -> None:
    request = generate_request("Hi", None, {"structured_output": Choice(("yes", "no"))})
    _, [target] = generate_from_proto(request)
    assert target.sampling.structured_output == Choice(("yes", "no"))


def test_several_samples_are_asked_of_sample_alone() -> None:
    assert sample_request("Hi", 3, None, {"seed": 1}).sampling.n == 3
    with pytest.raises(InvalidRequestError, match="ask sample for several"):
        generate_request("Hi", None, {"sampling": SamplingParams(n=3)})


def test_no_adapter_is_the_base_model_and_no_seed_stays_unset() -> None:
    request = generate_request("Hi", None, {})
    assert request.adapter == ""
    assert not request.sampling.HasField("seed")


def test_single_parameters_replace_those_of_a_whole() -> None:
    request = generate_request("Hi", None, {"sampling": SamplingParams(max_tokens=5, top_k=3), "max_tokens": 9})
    assert (request.sampling.max_tokens, request.sampling.top_k) == (9, 3)


def test_one_stop_string_is_not_its_characters() -> None:
    assert list(generate_request("Hi", None, {"stop": "end"}).sampling.stop) == ["end"]


def test_tokens_handles_and_whole_prompts_stand_for_messages() -> None:
    given = handle()
    assert build_prompt(None, {"token_ids": [1, 2]}) == Prompt(token_ids=(1, 2))
    assert build_prompt(None, {"text": "once"}) == Prompt(text="once")
    assert build_prompt("More", {"handle": given}) == Prompt((ChatMessage("user", "More"),), handle=given)
    assert build_prompt(None, {"prompt": Prompt(token_ids=(1,))}) == Prompt(token_ids=(1,))
    assert prefill_from_proto(prefill_request(None, {"token_ids": [1, 2]})).token_ids == (1, 2)


@pytest.mark.parametrize(("messages", "more"), [("Hi", {}), (None, {"token_ids": (1,)})])
def test_a_whole_prompt_goes_with_no_part_of_one(messages: Any, more: Any) -> None:
    with pytest.raises(InvalidRequestError, match="whole prompt"):
        build_prompt(messages, {"prompt": Prompt(token_ids=(1,)), **more})


def test_a_misspelt_argument_is_refused() -> None:
    unknown: Any = {"max_token": 3}
    with pytest.raises(TypeError, match="max_token"):
        generate_request("Hi", None, unknown)


def test_one_continuation_is_not_its_characters() -> None:
    assert list(score_request("Hi", ["yes", "no"], None, {}).continuations) == ["yes", "no"]
    with pytest.raises(InvalidRequestError, match="pass a list"):
        score_request("Hi", "yes", None, {})


def test_fan_out_targets_share_sampling_unless_they_bring_their_own() -> None:
    own = Target("certainty", SamplingParams(max_tokens=1))
    fan_out = fan_out_from_proto(fan_out_request("Hi", ["jailbreak", None, own], {"max_tokens": 7}))
    assert [(t.adapter, t.sampling.max_tokens) for t in fan_out.targets] == [
        ("jailbreak", 7),
        ("", 7),
        ("certainty", 1),
    ]


HALF = "caf\udce9"
"""As Python reads an argument that is not UTF-8."""


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: prefill_request([{"role": "user", "content": HALF}], {}), "prompt.messages[0]"),
        (lambda: prefill_request("Hi", {"documents": [Document("", "a"), Document("", HALF)]}), "prompt.documents[1]"),
        (lambda: prefill_request(None, {"text": HALF}), "prompt"),
        (lambda: generate_request("Hi", None, {"stop": HALF}), "sampling"),
        (lambda: generate_request("Hi", HALF, {}), "adapter"),
        (lambda: fan_out_request("Hi", ["a", HALF], {}), "targets"),
        (lambda: score_request("Hi", ["a", HALF], None, {}), "continuations"),
        (lambda: score_request("Hi", ["a"], HALF, {}), "adapter"),
        (lambda: convert.load_adapter_to_proto(HALF), "name"),
        (lambda: convert.unload_adapter_to_proto(HALF), "name"),
        (lambda: convert.run_intrinsics_to_proto(intrinsic_run("Hi", [HALF], None, {})), "intrinsics"),
        (lambda: convert.run_intrinsic_to_proto(intrinsic_run("Hi", [HALF], None, {})), "intrinsic"),
    ],
)
def test_a_text_that_is_not_utf8_is_refused_by_its_field(build: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not UTF-8") as caught:
        build()
    assert [violation.field for violation in caught.value.violations] == [field]
    str(caught.value).encode()
