"""OpenAI's own client, unmodified, against a front door before real services."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import pytest_asyncio
import trustme

from alora_serve.client import ChatMessage
from deployment import BLOCK_TOKENS, WORKER, Deployed, another_router
from front_door import FrontDoor, front_door
from tenants import key_of, write_access

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


async def test_documents_become_a_turn_that_base_model_and_intrinsics_share(tiny: Deployed, door: FrontDoor) -> None:
    """This model's template has no place for them."""
    told = "You have access to the following documents:\n\n[Document moon]\n" + "The moon pulls at the sea. " * 8
    turns = [TURNS[0], ChatMessage("user", told), TURNS[1]]
    expected = await tiny.client.generate(turns, max_tokens=8, ignore_eos=True).result()
    document = {"text": told.split("\n")[-1], "doc_id": "moon"}
    asked = {**BRIEF, "extra_body": {"ignore_eos": True, "documents": [document]}}
    answer = await door.openai.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    in_arguments = {"ignore_eos": True, "chat_template_kwargs": {"documents": [document], "adapter_name": "guard"}}
    verdict = await door.openai.chat.completions.create(**{**BRIEF, "extra_body": in_arguments})
    expected = await tiny.client.generate(turns, adapter="guard", max_tokens=8, ignore_eos=True).result()
    assert verdict.choices[0].message.content == expected.text
    body = {"messages": ASK, "documents": [document], "intrinsics": ["answer"]}
    async with httpx.AsyncClient(base_url=door.url) as http:
        (found,) = (await http.post("/v1/intrinsics", json=body)).json()["data"]
    usage = found["alora"]["usage"]
    assert usage["prompt_tokens"] == answer.usage.prompt_tokens
    assert usage["computed_tokens"] <= BLOCK_TOKENS, "all but the invocation was there"


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


SCHEMA = {
    "type": "object",
    "properties": {"certainty": {"enum": ["high", "low"]}, "sure": {"type": "boolean"}},
    "required": ["certainty", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", [MODEL, "guard"])
async def test_an_answer_is_held_to_a_json_schema(door: FrontDoor, model: str) -> None:
    answer = await door.openai.chat.completions.create(
        model=model,
        messages=ASK,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}},
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    verdict = json.loads(choice.message.content or "")
    assert set(verdict) == {"certainty", "sure"}
    with pytest.raises(openai.BadRequestError) as refused:
        await door.openai.chat.completions.create(
            model=model,
            messages=ASK,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )
    assert refused.value.body["param"].startswith("response_format")


async def test_an_answer_of_no_given_length_fits_and_what_does_not_fit_is_told_so(
    tiny: Deployed, door: FrontDoor
) -> None:
    context, room = (await tiny.client.get_model()).context_tokens, 5
    prompt = [1 + index % 250 for index in range(context - room)]
    ask: Any = partial(door.openai.completions.create, model=MODEL, extra_body={"ignore_eos": True})
    answer = await ask(prompt=prompt)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", room)
    for fields, param in (
        ({"prompt": prompt, "max_tokens": room + 1}, "max_tokens"),
        ({"prompt": prompt * 2}, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await ask(**fields)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)
        assert f"maximum context length is {context} tokens" in refused.value.message


async def test_likely_tokens_are_told_with_the_one_that_was_chosen_first(tiny: Deployed, door: FrontDoor) -> None:
    expected = await tiny.client.generate(TURNS, max_tokens=8, ignore_eos=True, logprobs=True).result()
    answer = await door.openai.chat.completions.create(**BRIEF, logprobs=True, top_logprobs=20)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.logprob for token in logprobs.content] == pytest.approx(expected.logprobs, abs=1e-5)
    for token in logprobs.content:
        assert len(token.top_logprobs) == 20
        assert (token.top_logprobs[0].token, token.top_logprobs[0].bytes) == (token.token, token.bytes)


async def test_keys_are_judged_by_the_router(tiny: Deployed, tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.yaml", {"one": {}})
    processes = tiny.local.processes
    async with (
        another_router([processes["prefill"].address], [processes[WORKER].address], access_file=str(access)) as router,
        front_door(router.address, api_key=key_of("one")) as guarded,
    ):
        assert (await guarded.openai.chat.completions.create(**BRIEF)).choices
        with pytest.raises(openai.AuthenticationError):
            await guarded.openai.with_options(api_key="guessed").chat.completions.create(**BRIEF)
        async with httpx.AsyncClient(base_url=guarded.url) as http:
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.get("/health")).status_code == (await http.head("/health")).status_code == 200


async def test_sigterm_lets_a_stream_end(tiny: Deployed) -> None:
    async with front_door(tiny.local.router_address, drain_seconds="30") as leaving:
        stream = await leaving.openai.chat.completions.create(**{**BRIEF, "max_tokens": 200}, stream=True)
        chunks = [await anext(stream)]
        stopping = asyncio.ensure_future(leaving.process.stop(60))
        chunks += [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        await stopping


async def test_it_speaks_tls_to_both_sides_and_takes_up_new_certificates(tiny: Deployed, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def issue(name: str) -> dict[str, str]:
        certificate = authority.issue_cert(name)
        certificate.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        return {"tls_cert_file": str(tmp_path / f"{name}.pem"), "tls_key_file": str(tmp_path / f"{name}.key")}

    public = "alora.example.com"
    its_own, routers, shown = issue("127.0.0.1"), issue(public), issue("front.example.com")
    to_router = {"router_tls_ca_file": str(tmp_path / "ca.pem"), "router_tls_server_name": public}
    to_router |= {f"router_{name}": file for name, file in shown.items()}
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    processes = tiny.local.processes
    async with (
        another_router([processes["prefill"].address], [processes[WORKER].address], **routers) as router,
        front_door(router.address, **to_router, **its_own) as door,
    ):

        async def serial() -> int:
            _, writer = await asyncio.open_connection(*door.listening.address.split(":"), ssl=trusted)
            seen: str = writer.get_extra_info("peercert")["serialNumber"]
            writer.close()
            return int(seen, 16)

        async with httpx.AsyncClient(base_url=f"https://{door.listening.address}", verify=trusted) as http:
            answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": ASK, "max_tokens": 2})
            assert answer.status_code == 200, answer.text
        async with httpx.AsyncClient(base_url=f"http://{door.listening.metrics_address}") as http:
            metrics = (await http.get("/metrics")).text
        for use in ("server", "peer"):
            assert f'alora_certificate_expiry_timestamp_seconds{{use="{use}"}}' in metrics
        before = await serial()
        issue("127.0.0.1")
        assert await serial() != before


async def test_the_command_line_starts_one(tiny: Deployed) -> None:
    command = [sys.executable, "-P", "-m", "alora_serve.cli.app", "http", "--listen", "127.0.0.1:0", "--json"]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "ALORA_ADDRESS": tiny.local.router_address},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        listening = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        async with httpx.AsyncClient(base_url=f"http://{listening['address']}") as http:
            assert (await http.get("/health")).json() == {"status": "ok"}
    finally:
        process.terminate()
        assert await process.wait() == 0
