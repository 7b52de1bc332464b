"""Every public RPC from Node: what it answers is what our Python client gets, errors with their details included."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google.rpc
import grpc
import pytest
import pytest_asyncio

from alora_serve.client import ChatMessage, GenerationResult, SamplingParams
from alora_serve.errors import InvalidRequestError
from alora_serve.v1 import alora_pb2
from deployment import GREEDY, PATIENCE_SECONDS, Deployed
from guarded_router import Guarded
from node_programs import PROGRAMS, ROOT, run_node

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

TURNS = [ChatMessage("user", "The moon is far and round, and nobody lives there. Is it far?")]
MORE = [ChatMessage("user", "And is it round?")]
TOKENS = tuple(range(20, 80))
SEED = 2**64 - 59
"""Beyond what a JavaScript number holds."""
DRAWN = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, top_p=0.9, seed=SEED, logprobs=True)
DECODE = "/alora_serve.v1.AdapterDecodeService/Decode"
WORKERS = ("worker-1", "worker-2")
LEFT = 4
"""Streams that the program leaves early: cancelled, too late, to be resumed, and to fill a quota."""
NOT_SERVED = {"PurgeTenant"}


@dataclass(frozen=True, slots=True)
class Told:
    """What the Node program printed, by part.

    Attributes:
        called: the status codes that each RPC ended with.
        cut_before: streams that workers had cut short before it ran.
    """

    answers: Any
    inspection: Any
    failures: Any
    guarded: Any
    called: dict[str, list[int]]
    cut_before: float


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def node(serving: Deployed, guarded: Guarded) -> Told:
    """The program's one run, on a router without and one with TLS and keys."""
    model = serving.model
    given = {
        "address": serving.local.router_address,
        "proto_root": str(ROOT / "proto"),
        "google_proto_root": str(Path(next(iter(google.rpc.__path__))).parents[1]),
        "conversation": [{"role": turn.role, "content": turn.content} for turn in TURNS],
        "more": [{"role": turn.role, "content": turn.content} for turn in MORE],
        "tokens": TOKENS,
        "seed": str(SEED),
        "adapter": model.appended,
        "answering": model.answering,
        "plain": model.plain,
        "guarded": {"address": guarded.address, "tls_ca_file": str(guarded.ca_file), "keys": guarded.keys},
    }
    cut_before = await cut_short(serving)
    return Told(**await asyncio.to_thread(run_node, "calls.js", given), cut_before=cut_before)


async def cut_short(serving: Deployed) -> float:
    """Streams that ended at the workers because nobody wanted them any more."""
    return sum(
        [
            await serving.metric(worker, "alora_rpc_handled_total", method=DECODE, code=code)
            for worker in WORKERS
            for code in ("CANCELLED", "DEADLINE_EXCEEDED")
        ]
    )


def same(found: Any, expected: GenerationResult) -> None:
    assert (found["kinds"][0], found["kinds"][-1]) == ("started", "finished")
    assert tuple(found["tokens"]) == expected.token_ids
    assert found["text"] == expected.text
    assert found["adapter_digest"] == expected.adapter_digest
    assert found["invocation_start"] == expected.usage.invocation_start
    assert found["finish_reason"] == f"FINISH_REASON_{expected.finish_reason.name}"
    assert found["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert found["usage"]["generated_tokens"] == len(expected.token_ids)


async def test_its_answers_are_those_of_our_client(serving: Deployed, node: Told) -> None:
    client, model = serving.client, serving.model
    base = await client.generate(TURNS, sampling=GREEDY).result()
    same(node.answers["base"], base)
    continued = await client.generate(MORE, handle=base.handle, sampling=GREEDY).result()
    same(node.answers["continued"], continued)
    assert node.answers["continued"]["usage"]["cached_tokens"] >= base.usage.prompt_tokens
    handle = (await client.prefill(TURNS)).handle
    same(node.answers["appended"], await serving.ask(handle, model.appended))
    same(node.answers["plain"], await client.generate(TURNS, adapter=model.plain, sampling=GREEDY).result())
    same(
        node.answers["from_tokens"],
        await client.generate(token_ids=TOKENS, adapter=model.appended, sampling=GREEDY).result(),
    )
    drawn = await client.generate(handle=handle, adapter=model.answering, sampling=DRAWN).result()
    same(node.answers["drawn"], drawn)
    assert node.answers["drawn"]["seed"] == str(SEED)
    assert node.answers["drawn"]["logprobs"] == pytest.approx(drawn.logprobs, abs=1e-4)


async def test_a_prefill_says_what_it_did_under_the_clients_id(node: Told) -> None:
    assert node.answers["prefilled"]["request_id"] == "node-prefill"
    usage = node.answers["prefilled"]["usage"]
    assert usage["prompt_tokens"] == usage["cached_tokens"] + usage["computed_tokens"] > 0


async def test_a_stream_that_was_left_goes_on_where_it_stood(node: Told) -> None:
    resumed = node.answers["resumed"]
    assert 0 < len(resumed["left"]) < DRAWN.max_tokens
    assert resumed["left"] + resumed["rest"] == node.answers["drawn"]["tokens"]


async def test_each_target_of_a_fan_out_has_its_answer_or_its_failure(serving: Deployed, node: Told) -> None:
    fan_out, model = node.answers["fan_out"], serving.model
    assert fan_out["failure"] is None
    *answered, failed = fan_out["targets"]
    for found, adapter in zip(answered, (model.appended, "", model.plain), strict=True):
        same(found, await serving.client.generate(TURNS, adapter=adapter, sampling=GREEDY).result())
    assert (failed["failure"]["code"], failed["failure"]["reason"]) == (5, "ADAPTER_NOT_FOUND")


async def test_adapters_and_model_are_as_our_client_sees_them(serving: Deployed, node: Told) -> None:
    listed = await serving.client.list_adapters()
    assert node.inspection["listed"] == [
        {
            "name": adapter.name,
            "digest": adapter.digest,
            "kind": f"ADAPTER_KIND_{str(adapter.kind).upper()}",
            "rank": adapter.rank,
            "invocation_tokens": list(adapter.invocation_tokens),
        }
        for adapter in listed
    ]
    assert node.inspection["loaded"]["name"] == serving.model.appended
    assert node.inspection["loaded"]["resident"] is True
    assert node.inspection["unloaded"] == {"was_resident": True}
    assert tuple(node.inspection["tokens"]) == (await serving.client.tokenize(TURNS)).prefix_tokens
    scores = (await serving.client.score(TURNS, ["yes", "no"], adapter=serving.model.appended)).scores
    for found, expected in zip(node.inspection["scored"], scores, strict=True):
        assert tuple(found["tokens"]) == expected.token_ids
        assert found["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    model = await serving.client.get_model()
    assert node.inspection["model"]["name"] == model.name
    assert node.inspection["model"]["model_digest"] == model.model_digest.hex()
    assert node.inspection["model"]["context_tokens"] == model.context_tokens


async def test_intrinsics_give_the_results_that_our_client_gets(serving: Deployed, node: Told) -> None:
    expected = await serving.client.run_intrinsic(TURNS, serving.model.answering)
    undefined, together = node.inspection["judged_together"]
    assert undefined["failure"]["reason"] == "INTRINSIC_UNDEFINED"
    for found in (node.inspection["judged"], together["result"]):
        assert found["raw_text"] == expected.raw_text
        likelihood = found["result"]["structValue"]["fields"]["likelihood"]["numberValue"]
        assert likelihood == pytest.approx(expected.result["likelihood"], abs=1e-4)
        assert found["probabilities"][0]["probabilities"].keys() == expected.probabilities[""].keys()


async def test_errors_arrive_with_their_details(serving: Deployed, node: Told) -> None:
    bad = node.failures["bad_fields"]
    with pytest.raises(InvalidRequestError) as caught:
        await serving.client.generate(TURNS, top_p=0, temperature=-1).result()
    assert (bad["code"], bad["message"]) == (3, str(caught.value))
    assert bad["details"]["status"] == {"code": 3, "message": bad["message"]}
    found = {(one["field"], one["description"]) for one in bad["details"]["google.rpc.BadRequest"]["field_violations"]}
    assert found == {(violation.field, violation.description) for violation in caught.value.violations}
    assert {field for field, _ in found} == {"sampling.top_p", "sampling.temperature"}
    assert reason(bad) == "REQUEST_INVALID"
    assert bad["details"]["google.rpc.RequestInfo"]["request_id"] == bad["trailers"] == "node-bad"
    assert (node.failures["bad_prompt"]["code"], reason(node.failures["bad_prompt"])) == (3, "REQUEST_INVALID")
    assert (node.failures["unknown"]["code"], reason(node.failures["unknown"])) == (5, "ADAPTER_NOT_FOUND")
    assert node.failures["not_served"].keys() == NOT_SERVED
    for failure in node.failures["not_served"].values():
        assert (failure["code"], reason(failure)) == (12, "FEATURE_UNIMPLEMENTED")


async def test_deadlines_and_cancelling_reach_the_worker(serving: Deployed, node: Told) -> None:
    assert node.failures["late"]["code"] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert node.failures["cancelled"]["failure"]["code"] == grpc.StatusCode.CANCELLED.value[0]
    assert node.failures["cancelled"]["tokens"] > 0
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await cut_short(serving) < node.cut_before + LEFT:  # noqa: ASYNC110  # asked over the network
            await asyncio.sleep(0.1)


async def test_a_router_that_asks_for_tls_and_keys_says_who_may_do_what(serving: Deployed, node: Told) -> None:
    told = node.guarded
    assert (told["without_key"]["code"], reason(told["without_key"])) == (16, "UNAUTHENTICATED")
    assert (told["without_role"]["code"], reason(told["without_role"])) == (7, "PERMISSION_REFUSED")
    assert told["with_role"] == serving.model.appended
    same(
        told["with_key"],
        await serving.client.generate(TURNS, adapter=serving.model.appended, sampling=GREEDY).result(),
    )
    over = told["over_quota"]
    assert (over["code"], reason(over)) == (8, "OVERLOADED")
    delay = over["details"]["google.rpc.RetryInfo"]["retry_delay"]
    assert delay.get("seconds", 0) + delay.get("nanos", 0) / 1e9 > 0


async def test_no_rpc_is_left_out(node: Told) -> None:
    methods = {method.name for method in alora_pb2.DESCRIPTOR.services_by_name["AloraService"].methods}
    assert node.called.keys() == methods
    assert {name for name, codes in node.called.items() if 0 not in codes} == NOT_SERVED


async def test_its_packages_are_pinned_by_digest_and_their_lock_names_no_address() -> None:
    lock = json.loads((PROGRAMS / "package-lock.json").read_text())["packages"]
    wanted = json.loads((PROGRAMS / "package.json").read_text())["dependencies"]
    assert {name: lock[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    for place, package in lock.items():
        assert "resolved" not in package, "npm install --package-lock-only --omit-lockfile-registry-resolved"
        assert package.get("integrity", "").startswith("sha512-") or not place


def reason(failure: Any) -> str:
    info = failure["details"]["google.rpc.ErrorInfo"]
    assert info["domain"] == "alora_serve"
    return str(info["reason"])
