"""Bad input gets a clear status that names the field, and nothing is lost: a good request right after it is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
import pytest_asyncio

from alora_serve.cli.local import LocalDeployment
from alora_serve.client import AsyncClient, ChatMessage, PrefixHandle
from alora_serve.errors import (
    AdapterNotFoundError,
    AloraServeError,
    DeadlinePassedError,
    HandleExpiredError,
    HandleInvalidError,
    InvalidRequestError,
    ModelMismatchError,
    OverloadedError,
    UnimplementedFeatureError,
)
from alora_serve.rpc.convert import handle_to_proto
from alora_serve.rpc.status import error_from_rpc
from alora_serve.v1 import alora_pb2, alora_pb2_grpc, types_pb2
from system import ANSWER_TOKENS, GUARD, TinyModel, ask, deployed, options, save_tiny_model
from tiny_models import FAMILIES, save_model

CONVERSATION = [ChatMessage("user", "Is the sea deep?")]
MAX_QUEUE = 100

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

Deployed = tuple[LocalDeployment, AsyncClient, TinyModel]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployed]:
    store = f"lmdb://{tmp_path_factory.mktemp('store')}/kv"
    chosen = options(tiny, store, max_queue=str(MAX_QUEUE), max_batch_sequences="8", tenant_salt="this deployment")
    async with deployed(chosen) as (deployment, client):
        yield deployment, client, tiny
        # Nothing was lost by all of the above: the right tokens, and no sequence left behind.
        handle = (await client.prefill(CONVERSATION)).handle
        answer = await ask(client, handle, "guard")
        assert answer.token_ids == tiny.cold_tokens("guard", tiny.prompt(handle, "guard"))
        await _until_idle(deployment)


def _gauge(deployment: LocalDeployment, process: str, name: str) -> float:
    with urlopen(f"http://{deployment.processes[process].metrics_address}/metrics") as page:
        lines = page.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def _until_idle(deployment: LocalDeployment) -> None:
    async with asyncio.timeout(20):
        running = 1.0
        while running:  # the process's own gauge: there is no event to wait for
            running, _ = await asyncio.gather(
                asyncio.to_thread(_gauge, deployment, "worker-1", "alora_engine_running_sequences"),
                asyncio.sleep(0.05),
            )


async def _refusal(served: Deployed, request: alora_pb2.GenerateRequest) -> AloraServeError:
    """The error of a raw call: the client library would refuse some of these before sending them."""
    deployment, _, _ = served
    async with grpc.aio.insecure_channel(deployment.router_address) as channel:
        stub = alora_pb2_grpc.AloraServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Generate(request, timeout=60):
                pass
    return error_from_rpc(refused.value)


def _user(text: str = "Is the sea deep?") -> types_pb2.Prompt:
    return types_pb2.Prompt(messages=[types_pb2.Message(role="user", content=text)])


def _sampling(**fields: object) -> alora_pb2.GenerateRequest:
    return alora_pb2.GenerateRequest(prompt=_user(), sampling=types_pb2.SamplingParams(**fields))  # type: ignore[arg-type]


BAD_REQUESTS: dict[str, tuple[alora_pb2.GenerateRequest, str]] = {
    "an empty conversation": (alora_pb2.GenerateRequest(prompt=types_pb2.Prompt()), "prompt"),
    "an unknown role": (
        alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(messages=[types_pb2.Message(role="robot", content="x")])),
        "prompt.messages[0].role",
    ),
    "a prompt beyond the context": (alora_pb2.GenerateRequest(prompt=_user("word " * 400)), "prompt"),
    "max_tokens beyond the context": (_sampling(max_tokens=600), "sampling.max_tokens"),
    "a negative temperature": (_sampling(temperature=-1.0), "sampling.temperature"),
    "top_p of nothing": (_sampling(top_p=0.0), "sampling.top_p"),
    "an empty stop string": (_sampling(stop=[""]), "sampling.stop[0]"),
}


@pytest.mark.parametrize("what", sorted(BAD_REQUESTS))
async def test_bad_fields_are_named(served: Deployed, what: str) -> None:
    request, field = BAD_REQUESTS[what]
    error = await _refusal(served, request)
    assert isinstance(error, InvalidRequestError)
    assert field in [violation.field for violation in error.violations]


async def test_an_unknown_adapter_lists_the_nearest_names(served: Deployed) -> None:
    error = await _refusal(served, alora_pb2.GenerateRequest(prompt=_user(), adapter="gaurd"))
    assert isinstance(error, AdapterNotFoundError)
    assert "guard" in str(error)


async def test_a_handle_with_a_bad_mac_is_refused(served: Deployed) -> None:
    _, client, _ = served
    handle = handle_to_proto((await client.prefill(CONVERSATION)).handle)
    handle.prefix_token_ids = handle.prefix_token_ids[:-4] + bytes(4)
    error = await _refusal(served, alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(handle=handle)))
    assert isinstance(error, HandleInvalidError)
    assert [violation.field for violation in error.violations] == ["prompt.handle"]


async def _foreign_handle(tiny: TinyModel, store: Path, **settings: str) -> PrefixHandle:
    """A handle from a deployment of its own, with the same secret."""
    async with deployed(options(tiny, f"lmdb://{store}/kv", **settings)) as (_, client):
        return (await client.prefill(CONVERSATION)).handle


async def test_a_handle_of_another_servers_salt_is_refused(served: Deployed, tmp_path: Path) -> None:
    _, _, tiny = served
    handle = handle_to_proto(await _foreign_handle(tiny, tmp_path, tenant_salt="another deployment"))
    error = await _refusal(served, alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(handle=handle)))
    assert isinstance(error, HandleInvalidError)
    assert error.violations


async def test_a_handle_of_another_model_is_a_failed_precondition(served: Deployed, tmp_path: Path) -> None:
    _, _, tiny = served
    other = TinyModel(save_model(tmp_path / "other", FAMILIES["llama"](), seed=5), tiny.adapters, tiny.invocations)
    handle = handle_to_proto(await _foreign_handle(other, tmp_path, tenant_salt="this deployment"))
    error = await _refusal(served, alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(handle=handle)))
    assert isinstance(error, ModelMismatchError)


async def test_an_expired_handle_is_refused(
    served: Deployed, tmp_path: Path, signed: Callable[[PrefixHandle], PrefixHandle]
) -> None:
    _, client, _ = served
    handle = signed((await client.prefill(CONVERSATION)).handle)
    request = alora_pb2.GenerateRequest(prompt=types_pb2.Prompt(handle=handle_to_proto(handle)))
    error = await _refusal(served, request)
    assert isinstance(error, HandleExpiredError)
    assert [violation.field for violation in error.violations] == ["prompt.handle"]


@pytest.fixture
def signed() -> Callable[[PrefixHandle], PrefixHandle]:
    """Signs as the deployment does, two hours ago, for one hour."""
    import time

    from alora_serve.handles import HandleSigner
    from system import SECRET

    signer = HandleSigner([SECRET.encode()], b"this deployment", 3600, clock=lambda: time.time() - 7200)
    return signer.sign


async def test_a_request_of_20_mib_is_refused(served: Deployed) -> None:
    error = await _refusal(served, alora_pb2.GenerateRequest(prompt=_user("x" * (20 << 20))))
    assert error.status == "RESOURCE_EXHAUSTED"


async def test_a_stop_string_that_is_not_utf8_is_named(served: Deployed) -> None:
    deployment, _, _ = served
    raw = _sampling(stop=["STOPSTOP"]).SerializeToString().replace(b"STOPSTOP", b"STOP\xff\xfe\xfd\xfc")
    async with grpc.aio.insecure_channel(deployment.router_address) as channel:
        call = channel.unary_stream("/alora_serve.v1.AloraService/Generate", request_serializer=bytes)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in call(raw, timeout=30):
                pass
    error = error_from_rpc(refused.value)
    assert isinstance(error, InvalidRequestError)
    assert "sampling.stop" in error.violations[0].field


async def test_a_deadline_already_passed_starts_nothing(served: Deployed) -> None:
    _, client, _ = served
    with pytest.raises(DeadlinePassedError):
        await client.generate(CONVERSATION, timeout_seconds=0.0).result()


async def test_a_client_gone_mid_stream_leaves_its_place_free(served: Deployed) -> None:
    deployment, client, _ = served
    async with client.generate(CONVERSATION, max_tokens=400, ignore_eos=True) as stream:
        events = aiter(stream)
        for _ in range(5):
            await anext(events)
        assert await asyncio.to_thread(_gauge, deployment, "worker-1", "alora_engine_running_sequences") == 1
    await _until_idle(deployment)
    generated = await asyncio.to_thread(_gauge, deployment, "worker-1", "alora_engine_step_tokens_total")
    assert generated < 400


async def test_a_thousand_requests_against_a_bound_of_a_hundred(served: Deployed) -> None:
    _, client, tiny = served
    handle = (await client.prefill(CONVERSATION)).handle
    expected = tiny.cold_tokens("guard", tiny.prompt(handle, "guard"))

    results = await asyncio.gather(*(ask(client, handle, "guard") for _ in range(1000)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, OverloadedError)]
    served_ones = [result for result in results if not isinstance(result, BaseException)]
    assert len(refused) + len(served_ones) == 1000
    assert refused
    assert all(error.retry_after_seconds and error.retry_after_seconds > 0 for error in refused)
    assert len(served_ones) >= MAX_QUEUE
    assert {answer.token_ids for answer in served_ones} == {expected}


UNSERVED: dict[str, alora_pb2.GenerateRequest] = {
    "sampling.top_logprobs": _sampling(top_logprobs=3),
    "sampling.n": _sampling(n=2),
    "sampling.structured_output": _sampling(structured_output=types_pb2.StructuredOutput(regex="a*")),
    "resume": alora_pb2.GenerateRequest(prompt=_user(), resume=types_pb2.Resume(seed=1)),
    "prompt.documents": alora_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(
            messages=[types_pb2.Message(role="user", content="x")], documents=[types_pb2.Document(text="y")]
        )
    ),
}


@pytest.mark.parametrize("field", sorted(UNSERVED))
async def test_what_is_not_served_yet_says_so_by_name(served: Deployed, field: str) -> None:
    error = await _refusal(served, UNSERVED[field])
    assert isinstance(error, UnimplementedFeatureError)
    assert field in str(error)


async def test_the_text_of_special_tokens_in_a_message_stays_text_and_turns_nothing_on(served: Deployed) -> None:
    """The invocation's own text inside a user's message: taken for tokens, it would move the adapter's start."""
    _, client, tiny = served
    handle = (await client.prefill([ChatMessage("user", "say <|guard|>\n<|guard|> now")])).handle
    assert GUARD[0] not in handle.prefix_tokens
    answer = await ask(client, handle, "guard")
    assert answer.usage.invocation_start == len(handle.prefix_tokens)
    assert answer.token_ids == tiny.cold_tokens("guard", tiny.prompt(handle, "guard"), ANSWER_TOKENS)
