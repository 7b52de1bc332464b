"""Text that cannot fit is known by its length, and only where that is certain."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

import small_tokenizers as small
from alora_serve.errors import ContextExceededError
from alora_serve.handles import HandleSigner
from alora_serve.model.chat import ChatTokenizer
from alora_serve.model.plain_text import PlainTextTokenizer
from alora_serve.model.token_lengths import longest_token_bytes
from alora_serve.types import ChatMessage, PrefixHandle, PromptKind

BYTE_LEVEL = PlainTextTokenizer(small.byte_level_tokenizer())
CONTEXT_TOKENS = 64


def changed(**changes: Any) -> dict[str, Any]:
    return BYTE_LEVEL.serialized | changes


def test_of_byte_level_bpe_it_is_that_of_the_longest_token() -> None:
    longest = max(BYTE_LEVEL.serialized["model"]["vocab"], key=len)
    named = max(token["content"] for token in BYTE_LEVEL.serialized["added_tokens"])
    assert longest_token_bytes(BYTE_LEVEL.serialized) == max(len(longest), len(named.encode()), len("<|endoftext|>"))


@pytest.mark.parametrize(
    "serialized",
    [
        PlainTextTokenizer(small.byte_fallback_tokenizer()).serialized,
        PlainTextTokenizer(small.tokenizer_with_unknown_token()).serialized,
        PlainTextTokenizer(small.byte_level_tokenizer(normalizer=normalizers.NFKC())).serialized,
        PlainTextTokenizer(small.byte_level_tokenizer(not_special=[AddedToken("<x>", rstrip=True)])).serialized,
        changed(pre_tokenizer=None),
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]}),
        changed(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
                    BYTE_LEVEL.serialized["pre_tokenizer"],
                ],
            }
        ),
    ],
    ids=["byte fallback", "unknown token", "normalizer", "added token that strips", "none", "blanks lost", "removed"],
)
def test_of_others_it_is_not_known(serialized: dict[str, Any]) -> None:
    assert longest_token_bytes(serialized) is None


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet=" the\n※<|im_end|>é数") | st.sampled_from(small.SENTENCES))
def test_no_text_comes_to_fewer(text: str) -> None:
    assert BYTE_LEVEL.least_tokens(text) <= len(BYTE_LEVEL.encode_raw(text))


def of_text(chat: ChatTokenizer, text: str) -> object:
    return chat.raw(text)


def of_messages(chat: ChatTokenizer, text: str) -> object:
    return chat.render([ChatMessage("user", text)])


def of_a_handle(chat: ChatTokenizer, text: str) -> object:
    handle = PrefixHandle(b"m" * 32, b"s" * 32, (1,), (), PromptKind.CONVERSATION, "user", False, 0)
    signed = HandleSigner([b"a secret of these tests"], b"", 60).sign(handle)
    return chat.continue_from(signed, [ChatMessage("assistant", text)])


@pytest.mark.parametrize("tokenized", [of_text, of_messages, of_a_handle])
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    tokenized: Callable[[ChatTokenizer, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatTokenizer(small.byte_level_tokenizer(), context_tokens=CONTEXT_TOKENS)
    tokenized(chat, "the answer " * 30)  # too long in tokens, as those who count them will say

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("it was tokenized")

    for name in ("encode", "encode_raw"):
        monkeypatch.setattr(chat._tokens, name, refuse)
    with pytest.raises(ContextExceededError, match=f"maximum context length is {CONTEXT_TOKENS} tokens") as caught:
        tokenized(chat, "the answer " * 1000)
    assert [violation.field for violation in caught.value.violations] == ["prompt"]


def test_a_long_text_leaves_pythons_lock_to_others() -> None:
    text = json.dumps(list(range(60_000)))
    ticks, done = 0, threading.Event()

    def tokenize() -> None:
        BYTE_LEVEL.encode_raw(text)
        done.set()

    thread = threading.Thread(target=tokenize)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 5
