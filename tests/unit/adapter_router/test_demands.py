"""What calls need of endpoints: the right key, model and adapter, and what they may have to wait for."""

from __future__ import annotations

from typing import Any

from adapter_router.affinity import adapter_key, conversation_key, opening_key
from adapter_router.demands import Demands
from alora_serve.kv.fingerprints import STRIDE_TOKENS, PrefixFingerprints
from alora_serve.types import ChatMessage, Document, Prompt
from fake_services import adapter, handle, model

NAMES = PrefixFingerprints(b"salt")
DEMANDS = Demands(NAMES)
TOKENS = tuple(range(2 * STRIDE_TOKENS + 10))
HANDLE = handle(TOKENS)
MODELS = {model().model_digest}
PRINTS = NAMES.of(TOKENS, model_digest=model().model_digest)


def test_an_adapter_is_close_to_its_weights_and_may_fetch_the_conversation() -> None:
    demand = DEMANDS.generation(HANDLE, adapter("a"))
    assert (demand.key, demand.adapter, demand.model_digests) == (adapter_key("a"), "a", MODELS)
    assert (demand.fingerprints, demand.prefix_tokens, demand.computed_tokens) == (PRINTS, len(TOKENS), 0)


def test_the_base_model_is_close_to_the_conversation() -> None:
    demand = DEMANDS.generation(HANDLE, None)
    assert (demand.key, demand.adapter, demand.fingerprints) == (conversation_key(TOKENS), "", PRINTS)


def test_plain_lora_computes_every_token_wherever_it_goes() -> None:
    demand = DEMANDS.generation(HANDLE, adapter("p", "lora"))
    assert (demand.fingerprints, demand.prefix_tokens, demand.computed_tokens) == ((), 0, len(TOKENS))


def test_a_fan_out_is_close_to_the_conversation_and_placed_as_one() -> None:
    demands = DEMANDS.fan_out(HANDLE, [adapter("a"), None, adapter("p", "lora")])
    assert [demand.adapter for demand in demands] == ["a", "", "p"]
    assert [demand.group_size for demand in demands] == [3, 2, 1]
    assert {demand.key for demand in demands} == {conversation_key(TOKENS)}
    assert [demand.prefix_tokens for demand in demands] == [len(TOKENS), len(TOKENS), 0]
    assert demands[0].together == set()
    demands[0].together.add("somewhere")
    assert demands[2].together == {"somewhere"}
    assert DEMANDS.fan_out(HANDLE, [None])[0].together == set()
    assert DEMANDS.generation(HANDLE, None).together is None


def test_a_prefill_is_close_to_its_conversation_by_what_is_known_of_it() -> None:
    messages = (ChatMessage("user", "q"),)
    assert DEMANDS.prefill(Prompt(messages=messages), MODELS).key == opening_key(messages)
    assert DEMANDS.prefill(Prompt(token_ids=TOKENS), MODELS).key == conversation_key(TOKENS)
    by_text = [DEMANDS.prefill(Prompt(text=text), MODELS).key for text in ("a" * 5000, "a" * 5001, "b")]
    assert by_text[0] == by_text[1] != by_text[2]
    continued = DEMANDS.prefill(Prompt(messages=messages, handle=HANDLE), MODELS)
    assert (continued.key, continued.fingerprints) == (conversation_key(TOKENS), PRINTS)
    assert continued.model_digests == MODELS


def expected_tokens(**prompt: Any) -> int:
    return DEMANDS.prefill(Prompt(**prompt), MODELS).expected_tokens


def test_a_prefill_is_expected_to_run_what_is_new() -> None:
    def turn(role: str, tokens: int) -> ChatMessage:
        return ChatMessage(role, "four" * tokens)

    asked = (turn("system", 100), turn("user", 20))
    assert expected_tokens(messages=asked) == 120
    assert expected_tokens(messages=asked, documents=(Document("title", "four" * 500),)) == 620
    answered = (*asked, turn("assistant", 7), turn("user", 3))
    assert expected_tokens(messages=answered) == 10, "the rest was prefilled for the turn before"
    assert expected_tokens(messages=answered, documents=(Document("title", "four" * 500),)) == 10
    assert expected_tokens(messages=(turn("user", 3),), handle=HANDLE) == 3
    assert expected_tokens(handle=HANDLE) == 0
    assert expected_tokens(text="four" * 9) == 9
    assert expected_tokens(text="四" * 8) == 6, "bytes, not characters"
    assert expected_tokens(token_ids=TOKENS) == len(TOKENS)


def test_a_generation_is_expected_to_run_only_what_it_certainly_does() -> None:
    demands = [DEMANDS.generation(HANDLE, each) for each in (None, adapter("a"), adapter("p", "lora"))]
    assert [demand.expected_tokens for demand in demands] == [0, 0, 0]
