"""Conversations become the tokens of ``apply_chat_template``, and bad ones are refused by field."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import small_tokenizers as small
from alora_serve.errors import InvalidRequestError, ModelUnsupportedError, UnimplementedFeatureError
from alora_serve.model.chat import ChatTokenizer, RenderedPrompt
from alora_serve.rpc.convert import prompt_from_proto, prompt_to_proto
from alora_serve.types import ChatMessage, Document, Prompt, ToolCall
from alora_serve.v1 import types_pb2

USER = ChatMessage("user", "Is the answer in the document?")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = ChatMessage("assistant", "", tool_calls=(ToolCall("a1", "weather", '{"place": "Paris", "days": 2}'),))

words = st.text(alphabet=st.characters(exclude_characters="<>|※", exclude_categories=("Cs",)), max_size=40)
conversations = st.lists(
    st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant", "tool"]), words), min_size=1, max_size=6
)


def applied(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], **arguments: Any) -> tuple[int, ...]:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    return tuple(tokenizer.apply_chat_template(conversation, **arguments)["input_ids"])


@pytest.mark.parametrize("name", small.TEMPLATES)
@settings(max_examples=60)
@given(messages=conversations)
def test_ordinary_conversations_get_the_tokens_of_apply_chat_template(name: str, messages: list[ChatMessage]) -> None:
    tokenizer = BYTE_LEVEL[name]
    rendered = CHAT[name].render(messages, template_arguments={"date": "1 May 2026"})
    assert rendered.prefix_tokens == applied(tokenizer, messages, date="1 May 2026")
    assert rendered.prefix_tokens + rendered.generation_prompt_tokens == applied(
        tokenizer, messages, date="1 May 2026", add_generation_prompt=True
    )
    assert rendered.last_role == messages[-1].role


@pytest.mark.parametrize("name", ["chatml", "tools"])
@settings(max_examples=30)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1), special=st.booleans())
def test_a_raw_prompt_gets_the_tokens_of_the_tokenizer_itself(name: str, text: str, special: bool) -> None:
    tokenizer = BYTE_LEVEL[name]
    text += next(iter(tokenizer.get_added_vocab())) if special else ""
    assert CHAT[name].raw(text) == RenderedPrompt(tuple(tokenizer(text)["input_ids"]), (), "")


def test_a_raw_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no token"):
        next(iter(CHAT.values())).raw("")


BYTE_LEVEL = {name: small.byte_level_tokenizer(template) for name, template in small.TEMPLATES.items()}
CHAT = {name: ChatTokenizer(tokenizer) for name, tokenizer in BYTE_LEVEL.items()}


@settings(max_examples=60)
@given(messages=conversations)
def test_a_tokenizer_that_prepends_spaces_gets_the_same_tokens_too(messages: list[ChatMessage]) -> None:
    tokenizer = small.byte_fallback_tokenizer()
    rendered = ChatTokenizer(tokenizer).render(messages)
    whole = applied(tokenizer, messages, add_generation_prompt=True)
    assert rendered.prefix_tokens + rendered.generation_prompt_tokens == whole


def test_the_real_model_gets_the_same_tokens_too(smollm2: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(smollm2)

    @settings(max_examples=200)
    @given(messages=conversations)
    def check(messages: list[ChatMessage]) -> None:
        rendered = chat.render(messages)
        whole = applied(smollm2, messages, add_generation_prompt=True)
        assert rendered.prefix_tokens + rendered.generation_prompt_tokens == whole

    check()
    invocation = tuple(smollm2.encode("<|im_start|>jailbreak<|im_end|>", add_special_tokens=False))
    assert invocation == (1, 90, 636, 17653, 2)
    assert (chat.spell(invocation), chat.decode(invocation)) == ("<|im_start|>jailbreak<|im_end|>", "jailbreak")
    assert chat.is_prefix_stable
    assert not chat.prints_date


def test_a_generation_prompt_that_does_not_extend_the_turns_is_split_at_a_token() -> None:
    tokenizer = small.byte_level_tokenizer(small.ENDS_DIFFERENTLY)
    chat = ChatTokenizer(tokenizer)
    rendered = chat.render([USER])
    assert not chat.is_prefix_stable
    whole = applied(tokenizer, [USER], add_generation_prompt=True)
    assert rendered.prefix_tokens + rendered.generation_prompt_tokens == whole
    assert tokenizer.decode(rendered.generation_prompt_tokens) == "<|im_start|>assistant\n"


def test_tools_and_template_arguments_are_rendered_in_the_order_of_the_request() -> None:
    properties = {name: {"type": "string", "description": name} for name in ("z", "type", "m", "$defs", "b", "a")}
    tool = {
        "function": {"parameters": {"properties": properties, "type": "object"}, "name": "f"},
        "type": "function",
    }
    tokenizer = small.byte_level_tokenizer("{{ options | tojson }}" + small.TOOLS)
    prompt = Prompt(messages=(USER,), tools=(tool,), template_arguments={"options": properties})
    request = prompt_to_proto(prompt).SerializeToString()
    read = prompt_from_proto(types_pb2.Prompt.FromString(request))
    rendered = ChatTokenizer(tokenizer).render(
        read.messages, tools=read.tools, template_arguments=read.template_arguments
    )
    assert rendered.prefix_tokens == applied(tokenizer, [USER], tools=[tool], options=properties)


def test_template_arguments_reach_the_generation_prompt() -> None:
    rendered = CHAT["thinking"].render([USER], template_arguments={"enable_thinking": False})
    text = BYTE_LEVEL["thinking"].decode(rendered.generation_prompt_tokens)
    assert text == "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_documents_tools_and_tool_calls_reach_the_template() -> None:
    answer = ChatMessage("tool", "12 degrees", tool_call_id="a1", name="weather")
    document = Document("Notes", "Paris is in France.", doc_id="n1")
    rendered = CHAT["tools"].render([USER, CALL, answer], documents=[document], tools=[WEATHER])
    function = {"name": "weather", "arguments": {"place": "Paris", "days": 2}}
    expected = BYTE_LEVEL["tools"].apply_chat_template(
        [
            {"role": "user", "content": USER.content},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "a1", "type": "function", "function": function}],
            },
            {"role": "tool", "content": "12 degrees", "tool_call_id": "a1", "name": "weather"},
        ],
        documents=[{"title": "Notes", "text": "Paris is in France.", "doc_id": "n1"}],
        tools=[WEATHER],
    )
    assert rendered.prefix_tokens == tuple(expected["input_ids"])


def test_a_template_with_variants_uses_the_one_for_tools() -> None:
    tokenizer = small.byte_level_tokenizer({"default": small.CHATML, "tool_use": small.TOOLS})
    chat = ChatTokenizer(tokenizer)
    assert chat.render([USER]).prefix_tokens == CHAT["chatml"].render([USER]).prefix_tokens
    assert chat.render([USER], tools=[WEATHER]) == CHAT["tools"].render([USER], tools=[WEATHER])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "prompt.messages"),
        ([USER, USER, ChatMessage("wizard", "hi")], "prompt.messages[2].role"),
        ([ChatMessage("user", 7)], "prompt.messages[0].content"),  # type: ignore[arg-type]
        ([ChatMessage("user", "", CALL.tool_calls)], "prompt.messages[0].tool_calls"),
        (
            [ChatMessage("assistant", "", (ToolCall("", "f", "{}"), ToolCall("", "f", "{'a': 1}")))],
            "prompt.messages[0].tool_calls[1].arguments_json",
        ),
        ([ChatMessage("assistant", "", (ToolCall("", "f", "[]"),))], "prompt.messages[0].tool_calls[0].arguments_json"),
        (
            [ChatMessage("assistant", "", (ToolCall("", "f", "[" * 100_000),))],
            "prompt.messages[0].tool_calls[0].arguments_json",
        ),
        ([ChatMessage("assistant", "", (ToolCall("", "f", r'{"a": "\ud800"}'),))], "prompt"),
    ],
)
def test_malformed_messages_are_refused_by_field(messages: list[ChatMessage], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        CHAT["tools"].render(messages)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_every_malformed_message_is_named() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        CHAT["chatml"].render([ChatMessage("a", ""), USER, ChatMessage("b", "")])
    assert [v.field for v in caught.value.violations] == ["prompt.messages[0].role", "prompt.messages[2].role"]


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"documents": [Document("", "text")]}, "prompt.documents"),
        ({"tools": [WEATHER]}, "prompt.tools_json"),
        ({"messages": [USER, CALL]}, "prompt.messages[1].tool_calls"),
        ({"messages": [ChatMessage("document a", "b"), USER]}, "prompt.messages[0].role"),
    ],
)
def test_what_a_template_would_drop_in_silence_is_refused(request_fields: dict[str, Any], field: str) -> None:
    with pytest.raises(UnimplementedFeatureError) as caught:
        CHAT["chatml"].render(**{"messages": [USER]} | request_fields)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    "name",
    ["messages", "documents", "tools", "add_generation_prompt", "tokenize", "chat_template", "continue_final_message",
     "sanitize_control_tokens", "self", "strftime_now", "raise_exception", "eos_token"],
)  # fmt: skip
def test_template_arguments_cannot_replace_what_the_server_sets(name: str) -> None:
    tokenizer = small.byte_level_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    with pytest.raises(InvalidRequestError) as caught:
        ChatTokenizer(tokenizer).render([USER], template_arguments={name: "x"})
    assert caught.value.violations[0].field == f"prompt.template_arguments_json[{name}]"


def test_a_refusal_by_the_template_carries_its_own_words() -> None:
    chat = ChatTokenizer(small.byte_level_tokenizer(small.ALTERNATING))
    with pytest.raises(InvalidRequestError, match=r"Roles must alternate, not again<\|im_end\|>$") as caught:
        chat.render([USER, ChatMessage("user", "again<|im_end|>")])
    assert caught.value.violations[0].field == "prompt.messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{{ undefined.field }}",
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_refuses_the_request(template: str) -> None:
    with pytest.raises(InvalidRequestError, match="refused by the chat template"):
        ChatTokenizer(small.byte_level_tokenizer(template)).render([USER])


def test_jinja_in_a_message_is_not_run() -> None:
    hostile = ChatMessage("user", "{{ 7 * 7 }}{% raw %}")
    text = BYTE_LEVEL["chatml"].decode(CHAT["chatml"].render([hostile]).prefix_tokens)
    assert "{{ 7 * 7 }}{% raw %}" in text


def test_a_model_without_a_chat_template_takes_only_token_ids() -> None:
    chat = ChatTokenizer(small.byte_level_tokenizer(None), [0])
    assert chat.end_of_sequence_ids == {0}
    assert not chat.is_prefix_stable
    with pytest.raises(InvalidRequestError, match="send token_ids"):
        chat.render([USER])


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelUnsupportedError, match="fast tokenizer"):
        ChatTokenizer(PreTrainedTokenizerBase())


def test_truncation_and_padding_of_the_given_tokenizer_have_no_effect() -> None:
    tokenizer = small.byte_level_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert ChatTokenizer(tokenizer).render([USER]) == CHAT["chatml"].render([USER])


def test_end_of_sequence_is_the_configs_ids_and_the_turn_end() -> None:
    tokenizer = small.byte_level_tokenizer()
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ChatTokenizer(tokenizer, [3, 5]).end_of_sequence_ids == {3, 5, turn_end}
    unclosed = small.byte_level_tokenizer("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    assert ChatTokenizer(unclosed, [3]).end_of_sequence_ids == {3}


def test_a_template_that_prints_the_date_is_known() -> None:
    assert CHAT["dated"].prints_date
    assert not CHAT["chatml"].prints_date


def test_vocabulary_counts_added_tokens_and_decoding_skips_special_ones() -> None:
    tokenizer = BYTE_LEVEL["chatml"]
    assert CHAT["chatml"].vocabulary_size == len(tokenizer)
    ids = tokenizer.encode("<|im_start|>Öl<think> ok<|im_end|>")
    assert CHAT["chatml"].decode(ids) == "Öl<think> ok"


def test_importing_the_tokenizer_does_not_load_torch() -> None:
    script = "import sys, alora_serve.model.chat, alora_serve.model.text; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"
