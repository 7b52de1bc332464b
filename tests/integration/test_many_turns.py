"""Twenty turns of a conversation, base turns and two adapters in between: every turn as if it had been run cold."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_serve.client import ChatMessage, PrefixHandle
from system import ANSWER_TOKENS, ask, deployed, options, save_tiny_model

TURNS = 20
BLOCK_TOKENS = 16


@pytest.mark.timeout(400)
async def test_every_turn_equals_a_cold_run_and_computes_only_what_is_new(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    async with deployed(options(model, f"lmdb://{tmp_path}/kv")) as (_, client):
        known_tokens = 0  # positions whose KV some turn has computed
        handle: PrefixHandle | None = None
        for turn in range(TURNS):
            adapter = ("", "guard", "", "answer")[turn % 4]
            question = f"q{turn}?"
            if adapter:
                assert handle is not None
                prefilled = await client.prefill(handle=handle)
                prompt = model.prompt(prefilled.handle, adapter)
                closing = len(prefilled.handle.prefix_tokens) - known_tokens
                assert prefilled.usage.computed_tokens <= closing + BLOCK_TOKENS
                known_tokens = len(prefilled.handle.prefix_tokens)
                result = await ask(client, prefilled.handle, adapter)
                assert result.usage.computed_tokens == len(model.invocations[adapter])
                handle = prefilled.handle
            else:
                stream = client.generate(
                    [ChatMessage("user", question)], handle=handle, max_tokens=ANSWER_TOKENS, ignore_eos=True
                )
                result = await stream.result()
                assert result.handle is not None
                whole = result.handle.prefix_tokens
                prompt = whole[: len(whole) - ANSWER_TOKENS]
                assert result.usage.prompt_tokens == len(prompt)
                assert result.usage.computed_tokens <= len(prompt) - known_tokens + BLOCK_TOKENS
                handle, known_tokens = result.handle, len(whole) - 1  # the last token was chosen, not run
            assert result.token_ids == model.cold_tokens(adapter, prompt), f"turn {turn} with {adapter or 'base'}"


@pytest.mark.timeout(300)
async def test_messages_alone_stay_right_and_recompute_from_where_an_answer_retokenizes(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """A tiny model's random bytes rarely tokenize back to themselves: the worst case for messages without a handle."""
    model = save_tiny_model(tmp_path)
    async with deployed(options(model, f"lmdb://{tmp_path}/kv")) as (_, client):
        messages: list[ChatMessage] = []
        for turn in range(4):
            messages.append(ChatMessage("user", f"q{turn}?"))
            prefilled = await client.prefill(messages)
            result = await client.generate(messages, max_tokens=ANSWER_TOKENS, ignore_eos=True).result()
            prompt = model.prompt(prefilled.handle, "")
            assert result.token_ids == model.cold_tokens("", prompt)
            assert result.handle is not None
            same = result.handle.prefix_tokens[: len(prompt)] == prompt
            assert same
            record_property(f"turn {turn}: computed of prompt", f"{prefilled.usage.computed_tokens} of {len(prompt)}")
            # What was prefilled before is never computed again, whatever became of the answer's tokens.
            assert result.usage.computed_tokens <= len(prefilled.handle.generation_prompt_tokens) + BLOCK_TOKENS
            messages.append(ChatMessage("assistant", result.text))
