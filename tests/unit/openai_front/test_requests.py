"""Bodies become the prompts and parameters of the gRPC API, and what has no meaning is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from alora_serve.client import ChatMessage, Document, Prompt, SamplingParams, ToolCall
from alora_serve.errors import AloraServeError, InvalidRequestError, UnimplementedFeatureError
from alora_serve.types import Choice, Grammar, JsonSchema, Regex
from openai_front.chat_request import ChatRequest
from openai_front.completion_request import CompletionRequest
from openai_front.failures import validation_error

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "required": ["place"]}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SCHEMA = {"type": "object", "properties": {"certainty": {"enum": ["high", "low"]}}}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": HELLO, **fields})


def text(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "once", **fields})


def test_a_conversation_with_everything_in_it_becomes_a_prompt() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    request = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "How is"}, {"type": "text", "text": "Rome?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"},
        ],
        tools=[WEATHER],
        documents=[{"text": "It rained.", "doc_id": 3}],
        chat_template_kwargs={"enable_thinking": False, "adapter_name": "guard"},
    )
    assert request.prompt() == Prompt(
        messages=(
            ChatMessage("system", "Be brief."),
            ChatMessage("user", "How is\nRome?"),
            ChatMessage("assistant", "", (ToolCall("c1", "weather", '{"place": "Rome"}'),)),
            ChatMessage("tool", "sunny", (), "c1", "weather"),
        ),
        documents=(Document("", "It rained.", "3"),),
        template_arguments={"enable_thinking": False},
        tools=(WEATHER,),
    )
    assert request.adapter_names == {"adapter": None, "chat_template_kwargs.adapter_name": "guard"}


def test_documents_may_stand_among_the_templates_arguments_but_not_in_both_places() -> None:
    documents = [{"text": "It rained.", "title": "Weather"}]
    assert chat(chat_template_kwargs={"documents": documents}).prompt().documents == (
        Document("Weather", "It rained."),
    )
    with pytest.raises(InvalidRequestError, match="one of them"):
        chat(documents=documents, chat_template_kwargs={"documents": documents}).prompt()


def test_sampling_is_the_grpc_apis_unless_said_otherwise() -> None:
    assert chat().sampling_params() == text().sampling_params() == SamplingParams()
    everything = {
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 1.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"17": -100},
        "seed": -1,
        "stop": "end",
        "stop_token_ids": [2],
        "ignore_eos": True,
    }
    expected = SamplingParams(
        max_tokens=9,
        temperature=1,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={17: -100},
        seed=2**64 - 1,
        stop=("end",),
        stop_token_ids=(2,),
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
    )
    likely = {"logprobs": True, "top_logprobs": 3}
    assert chat(max_completion_tokens=9, **likely, **everything).sampling_params() == expected
    assert chat(max_tokens=9, **likely, **everything).sampling_params() == expected
    assert text(max_tokens=9, logprobs=3, **everything).sampling_params() == expected
    nothing = dict.fromkeys([*everything, "n", "logprobs", "tools", "response_format", "stream", "user"])
    assert chat(**nothing).sampling_params() == SamplingParams()


def form_of(**fields: Any) -> Any:
    return chat(**fields).sampling_params().structured_output


def test_a_form_is_asked_for_as_by_openai_and_as_by_vllm() -> None:
    schema = JsonSchema(json.dumps(SCHEMA))
    assert form_of(response_format={"type": "text"}) is None
    assert form_of(response_format={"type": "json_object"}) == JsonSchema('{"type": "object"}')
    named = {"name": "verdict", "schema": SCHEMA, "strict": True}
    assert form_of(response_format={"type": "json_schema", "json_schema": named}) == schema
    assert form_of(structured_outputs={"json": SCHEMA}) == form_of(guided_json=json.dumps(SCHEMA)) == schema
    assert form_of(structured_outputs={"regex": "a+"}) == form_of(guided_regex="a+") == Regex("a+")
    assert form_of(structured_outputs={"choice": ["a"]}) == form_of(guided_choice=["a"]) == Choice(("a",))
    assert form_of(structured_outputs={"grammar": "g"}) == form_of(guided_grammar="g") == Grammar("g")
    assert text(guided_json=SCHEMA).sampling_params().structured_output == schema


def test_a_tool_that_must_be_called_is_a_form() -> None:
    tools = {"tools": [WEATHER, CLOCK]}
    of_json = {"response_format": {"type": "json_object"}}
    assert form_of(tool_choice="none", **tools, **of_json) == form_of(tools=[], **of_json) == form_of(**of_json)
    assert form_of(tool_choice="auto", **tools) is form_of(tool_choice="none", **tools) is None
    chosen = {"type": "function", "function": {"name": "weather"}}
    assert form_of(tool_choice=chosen, **tools) == JsonSchema(json.dumps(WEATHER["function"]["parameters"]))  # type: ignore[index]
    required = json.loads(form_of(tool_choice="required", **tools).schema)
    assert [call["properties"]["name"] for call in required["anyOf"]] == [{"const": "weather"}, {"const": "clock"}]
    for bad in (chosen | {"function": {"name": "nobody"}}, "required"):
        with pytest.raises(InvalidRequestError, match="tool"):
            form_of(tool_choice=bad, tools=[CLOCK] if isinstance(bad, dict) else None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {str(2**32): 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": {}, "structured_outputs": {"regex": "a"}}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "tools": [CLOCK]}, "response_format"),
        ({"guided_regex": "a", "tools": [CLOCK], "tool_choice": "auto"}, "guided_regex"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        chat(**fields).sampling_params()
    assert [violation.field for violation in refused.value.violations] == [named]


def test_a_refusal_and_marks_of_a_cache_are_taken_back_as_text() -> None:
    marked = {"type": "text", "text": "Hello", "prompt_cache_breakpoint": {"mode": "explicit"}}
    refusal = {"type": "refusal", "refusal": "I'd rather not."}
    messages = [{"role": "user", "content": [marked]}, {"role": "assistant", "content": [refusal]}, *HELLO]
    asked = [message.content for message in chat(messages=messages).prompt().messages]
    assert asked == ["Hello", "I'd rather not.", "Hello"]


def refusal(kind: Any, **fields: Any) -> InvalidRequestError:
    with pytest.raises(ValidationError) as refused:
        kind(**fields)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()]
    return validation_error(errors, fields)


def refused_fields(kind: Any, **fields: Any) -> list[str]:
    return [violation.field for violation in refusal(kind, **fields).violations]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temprature": 1}, ["temprature"]),
        ({"temperature": "1"}, ["temperature"]),
        ({"temperature": True}, ["temperature"]),
        ({"seed": 1.5}, ["seed"]),
        ({"n": 0}, ["n"]),
        ({"n": 65}, ["n"]),
        ({"max_tokens": -1}, ["max_tokens"]),
        ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs"]),
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["messages[0].role"]),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, ["messages[0].mood"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["messages[0].content"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            [
                "messages[0].content[0].type",
                "messages[0].content[0].text",
                "messages[0].content[0].image_url",
            ],
        ),
        ({"tools": [{"type": "retrieval"}]}, ["tools[0].type", "tools[0].function"]),
        ({"functions": []}, ["functions"]),
        ({"audio": {"voice": "alloy"}}, ["audio"]),
        ({"model": ""}, ["model"]),
        ({"parallel_tool_calls": "no"}, ["parallel_tool_calls"]),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "refusal", "text": "x"}]}]},
            ["messages[0].content[0].refusal", "messages[0].content[0].text"],
        ),
        ({"stop": [None]}, ["stop", "stop[0]"]),
        ({"tool_choice": "any"}, ["tool_choice"]),
        ({"tool_choice": {"type": "function"}}, ["tool_choice", "tool_choice.function"]),
        ({"response_format": {"type": "json_schema"}}, ["response_format.json_schema"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            ["response_format.json_schema.schema"],
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, ["messages[0].content"]),
        ({"guided_choice": ["yes", "\ud83d"]}, ["guided_choice[1]"]),
        ({"adapter": "\ud83d"}, ["adapter"]),
        ({"documents": [{"content": "x"}]}, ["documents[0].text", "documents[0].content"]),
        ({"modalities": ["audio"]}, ["modalities[0]"]),
        ({"stream_options": {"include_costs": True}}, ["stream_options.include_costs"]),
        ({"temprature": 1, "n": 0}, ["n", "temprature"]),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(fields: dict[str, Any], named: list[str]) -> None:
    assert refused_fields(chat, **fields) == named


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "1"}, "temperature: is no number"),
        ({"adapter": "\ud83d"}, "adapter: holds half of a surrogate pair"),
        ({"audio": {}}, "audio: is no field that this server knows; see docs/http.md for those it takes"),
    ],
)
def test_what_is_wrong_is_told_in_our_words(fields: dict[str, Any], message: str) -> None:
    assert str(refusal(chat, **fields)) == message


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (None, ["prompt"]),
        (["a", [1]], ["prompt", "prompt[0]", "prompt[1]"]),
        ("\ud83d", ["prompt"]),
        (["a", "\ud83d"], ["prompt", "prompt[0]", "prompt[1]"]),
    ],
)
def test_a_prompt_of_another_kind_is_refused_by_its_place(prompt: Any, named: list[str]) -> None:
    assert sorted(refused_fields(text, prompt=prompt)) == named


def test_what_means_nothing_here_is_taken_and_left() -> None:
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_options": {"ttl": "1h"},
        "parallel_tool_calls": True,
        "functions": None,
        "function_call": None,
        "audio": None,
        "web_search_options": None,
        "moderation": None,
        "reasoning_effort": "low",
        "modalities": ["text"],
    }
    assert chat(**ignored).sampling_params() == chat().sampling_params()
    assert chat(**ignored).prompt() == chat().prompt()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("once", [Prompt(text="once")]),
        ([1, 2], [Prompt(token_ids=(1, 2))]),
        (["a", "b"], [Prompt(text="a"), Prompt(text="b")]),
        ([[1], [2, 3]], [Prompt(token_ids=(1,)), Prompt(token_ids=(2, 3))]),
    ],
)
def test_a_text_completion_takes_prompts_in_four_ways(prompt: Any, expected: list[Prompt]) -> None:
    assert text(prompt=prompt).prompts() == expected


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", ""], [[]], ["a"] * 65])
def test_a_text_completion_without_a_prompt_or_with_too_many_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        text(prompt=prompt).prompts()


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"n": 2, "best_of": 3}])
def test_what_openai_has_and_we_have_not_is_told_from_what_nobody_knows(fields: dict[str, Any]) -> None:
    with pytest.raises(UnimplementedFeatureError):
        text(**fields).sampling_params()
    assert text(echo=False, suffix="", best_of=1).sampling_params() == SamplingParams()


def test_usage_is_asked_for_with_a_stream_alone() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).wants_usage
    assert not chat(stream=True, stream_options={}).wants_usage
    assert not chat().wants_usage
    with pytest.raises(AloraServeError, match="stream: true"):
        _ = chat(stream_options={"include_usage": True}).wants_usage
