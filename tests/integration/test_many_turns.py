"""Many turns of a conversation, base turns and two adapters in between: every turn as if it had been run cold.

By handle, a turn computes only what is new. By messages alone it stays as right, and computes an answer again when its
text does not tokenize back to the tokens that were generated. There, what adapters answer joins the conversation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from alora_serve.client import ChatMessage, GenerationResult, PrefixHandle
from deployment import ANSWER_TOKENS, BLOCK_TOKENS, GREEDY, Deployed

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

BY_HANDLE = [("tiny", 20), ("smollm2", 20)]
BY_MESSAGES = [("tiny", 20), ("smollm2", 6)]
"""Fewer on the real model, for time: enough that later turns read what each adapter said."""

Asked = list[tuple[str, tuple[int, ...], tuple[int, ...]]]
"""Of each turn: the adapter, or none, the prompt, and what was answered."""


def _asked(running: Deployed, turn: int) -> str:
    """Who is asked: the base model, an adapter, the base model, the other adapter."""
    return ("", running.model.appended, "", running.model.answering)[turn % 4]


async def _assert_each_as_if_cold(running: Deployed, asked: Asked) -> None:
    expected = await asyncio.to_thread(running.model.cold_answers, [(adapter, prompt) for adapter, prompt, _ in asked])
    for turn, ((adapter, _, answer), cold) in enumerate(zip(asked, expected, strict=True)):
        assert answer == cold, f"turn {turn} with {adapter or 'base'}"


@pytest.mark.parametrize(("running", "turns"), BY_HANDLE, indirect=["running"])
async def test_by_handle_every_turn_equals_a_cold_run_and_computes_only_what_is_new(
    running: Deployed, turns: int
) -> None:
    handle: PrefixHandle | None = None
    computed_before = 0  # positions whose KV some turn has computed
    asked: Asked = []
    for turn in range(turns):
        adapter = _asked(running, turn)
        if adapter:
            # An adapter judges the conversation so far; here, its answer does not become part of it.
            assert handle is not None
            closed = await running.client.prefill(handle=handle)
            prompt = running.model.prompt(closed.handle, adapter)
            assert closed.usage.computed_tokens <= len(closed.handle.prefix_tokens) - computed_before
            result = await running.ask(closed.handle, adapter)
            assert result.usage.computed_tokens == len(running.model.suffix(closed.handle, adapter))
            handle, computed_before = closed.handle, len(closed.handle.prefix_tokens)
        else:
            result = await _base_turn(running, [ChatMessage("user", f"q{turn}?")], handle)
            assert result.handle is not None
            prompt = result.handle.prefix_tokens[:-ANSWER_TOKENS]
            assert result.handle.prefix_tokens[-ANSWER_TOKENS:] == result.token_ids
            assert result.usage.computed_tokens <= len(prompt) - computed_before
            handle = result.handle
            computed_before = len(handle.prefix_tokens) - 1  # the last token was chosen, and never run
        assert result.usage.prompt_tokens == len(prompt)
        asked.append((adapter, prompt, result.token_ids))
    await _assert_each_as_if_cold(running, asked)


async def test_a_worker_that_lost_its_memory_computes_at_most_a_block_more(tiny: Deployed) -> None:
    """Where a tail was evicted: the store still has the full blocks, and so has who was not restarted."""
    turn = await _base_turn(tiny, [ChatMessage("user", "Where is a tail?")], None)
    await tiny.local.restart("worker-1")
    handle = turn.handle
    for question in ("And where a block?", "And where a chain?"):
        turn = await _base_turn(tiny, [ChatMessage("user", question)], handle)
        new_tokens = turn.usage.prompt_tokens - (len(handle.prefix_tokens) - 1 if handle else 0)
        assert turn.usage.computed_tokens <= new_tokens + BLOCK_TOKENS
        assert turn.handle is not None
        assert turn.token_ids == tiny.model.cold_tokens("", turn.handle.prefix_tokens[:-ANSWER_TOKENS])
        handle = turn.handle


@pytest.mark.parametrize(("running", "turns"), BY_MESSAGES, indirect=["running"])
async def test_by_messages_alone_every_turn_equals_a_cold_run_and_says_what_was_computed_again(
    running: Deployed, turns: int, record_property: Callable[[str, object], None]
) -> None:
    messages: list[ChatMessage] = []
    generated: tuple[int, ...] = ()  # the conversation as it was generated
    prefilled_before: tuple[int, ...] = ()  # the conversation as it tokenized the last time
    answers = round_trips = again = 0
    asked: Asked = []
    for turn in range(turns):
        adapter = _asked(running, turn)
        if not adapter:
            messages.append(ChatMessage("user", f"p{turn}?"))
        result = await running.client.generate(messages, adapter=adapter, sampling=GREEDY).result()
        handle = (await running.client.prefill(messages)).handle
        prompt = running.model.prompt(handle, adapter)
        asked.append((adapter, prompt, result.token_ids))
        # What was computed before, as it was generated or as it tokenized, is found again as far as it is the same.
        known = max(_common(prompt, generated[:-1]), _common(prompt, prefilled_before))
        assert result.usage.computed_tokens <= len(prompt) - known + BLOCK_TOKENS, f"turn {turn}"
        if generated and prefilled_before[: len(generated)] != handle.prefix_tokens[: len(generated)]:
            answers += 1
            round_trips += handle.prefix_tokens[: len(generated)] == generated
            # By handle, it would have computed what follows the last token generated.
            again += max(0, result.usage.computed_tokens - (len(prompt) - (len(generated) - 1)))
        messages.append(ChatMessage("assistant", result.text))
        if adapter:
            # Its answer joins as text: base prefill computes that, and nothing else, whoever computed it before.
            joined = await running.client.prefill(messages)
            assert joined.handle.prefix_tokens[: len(handle.prefix_tokens)] == handle.prefix_tokens
            new_tokens = len(joined.handle.prefix_tokens) - len(handle.prefix_tokens)
            assert joined.usage.computed_tokens == new_tokens, f"turn {turn}"
            handle = joined.handle
        else:
            assert result.handle is not None
            generated = result.handle.prefix_tokens
        prefilled_before = handle.prefix_tokens
    await _assert_each_as_if_cold(running, asked)
    told = f"{round_trips} of {answers} answers tokenized back to themselves; {again} tokens were computed again"
    record_property("by messages alone", told)
    print(told)


async def _base_turn(
    running: Deployed, messages: Sequence[ChatMessage], handle: PrefixHandle | None
) -> GenerationResult:
    return await running.client.generate(messages, handle=handle, sampling=GREEDY).result()


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many leading tokens both have."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
