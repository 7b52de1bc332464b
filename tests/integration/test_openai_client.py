"""OpenAI's own client, unmodified, against a front door before real services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from alora_serve.client import ChatMessage
from deployment import Deployed
from front_door import FrontDoor, front_door

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL = "tiny-llama"
ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a tide?"}]
TURNS = [ChatMessage("system", "Be brief."), ChatMessage("user", "What is a tide?")]
BRIEF: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def door(tiny: Deployed) -> AsyncIterator[FrontDoor]:
    async with front_door(tiny.local.router_address) as running:
        yield running


async def test_a_whole_answer_is_that_of_the_grpc_api(tiny: Deployed, door: FrontDoor) -> None:
    expected = await tiny.client.generate(TURNS, max_tokens=8, ignore_eos=True).result()
    answer = await door.openai.chat.completions.create(**BRIEF)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == expected.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens
    (details,) = answer.model_extra["alora"]
    assert details["usage"]["generated_tokens"] == 8
    assert details["timings"]["total_seconds"] > 0


async def test_a_stream_comes_to_the_same_text_and_ends_with_its_cost(door: FrontDoor) -> None:
    whole = await door.openai.chat.completions.create(**BRIEF)
    stream = await door.openai.chat.completions.create(**BRIEF, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    "way",
    [
        {"model": "guard"},
        {"model": MODEL, "extra_body": {"adapter": "guard"}},
        {"model": MODEL, "extra_body": {"chat_template_kwargs": {"adapter_name": "guard"}}},
    ],
    ids=["model", "adapter", "adapter_name"],
)
async def test_an_adapter_is_chosen_in_three_ways(tiny: Deployed, door: FrontDoor, way: dict[str, Any]) -> None:
    expected = await tiny.client.generate(TURNS, adapter="guard", max_tokens=8, ignore_eos=True).result()
    extra = {"ignore_eos": True, **way.get("extra_body", {})}
    answer = await door.openai.chat.completions.create(model=way["model"], messages=ASK, max_tokens=8, extra_body=extra)
    assert answer.choices[0].message.content == expected.text
    assert answer.model_extra["alora"][0]["adapter_digest"] == expected.adapter_digest


async def test_samples_differ_and_are_the_same_by_seed(door: FrontDoor) -> None:
    many = {**BRIEF, "n": 3, "temperature": 1.5, "seed": 7}
    first, second = await asyncio.gather(*(door.openai.chat.completions.create(**many) for _ in range(2)))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    assert first.usage is not None
    assert first.usage.completion_tokens == 24


async def test_text_completions_take_text_and_tokens_alike(tiny: Deployed, door: FrontDoor) -> None:
    text = "the tide is"
    expected = await tiny.client.generate(text=text, max_tokens=5, ignore_eos=True).result()
    extra = {"ignore_eos": True}
    one = await door.openai.completions.create(model=MODEL, prompt=text, max_tokens=5, extra_body=extra)
    assert one.choices[0].text == expected.text
    both = await door.openai.completions.create(
        model=MODEL, prompt=[text, "once upon"], n=2, max_tokens=5, extra_body=extra
    )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == expected.text
    assert both.choices[2].text == both.choices[3].text != expected.text


async def test_models_are_the_base_and_its_adapters(door: FrontDoor) -> None:
    models = {model.id: model async for model in await door.openai.models.list()}
    assert set(models) == {MODEL, "guard", "answer", "plain"}
    assert (await door.openai.models.retrieve("guard")).model_extra["parent"] == MODEL
    with pytest.raises(openai.NotFoundError):
        await door.openai.models.retrieve("nobody")


async def test_errors_are_openais(door: FrontDoor) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await door.openai.chat.completions.create(model="gaurd", messages=ASK)
    assert unknown.value.body["code"] == "ADAPTER_NOT_FOUND"
    assert unknown.value.body["param"] == "model"
    assert "guard" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as out_of_range:
        await door.openai.chat.completions.create(**BRIEF, top_p=0.0)
    assert out_of_range.value.body["param"] == "top_p"
    with pytest.raises(openai.BadRequestError) as misspelt:
        await door.openai.chat.completions.create(model=MODEL, messages=ASK, extra_body={"temprature": 1})
    assert misspelt.value.body["param"] == "temprature"
    assert misspelt.value.request_id
