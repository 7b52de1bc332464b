"""Every public RPC by ``buf curl``, which knows nothing but what the router's reflection says."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from alora_serve.v1 import alora_pb2
from deployment import ANSWER_TOKENS, GREEDY, Deployed
from guarded_router import Guarded

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

BUF = Path(sys.executable).parent / "buf"
SERVICE = alora_pb2.DESCRIPTOR.services_by_name["AloraService"]
WORDS = "The library closes at eight and opens again at nine. When does it open?"
MORE = "And when does it close?"
REQUEST_INVALID = "REQUEST_INVALID"
SAMPLING = {"maxTokens": ANSWER_TOKENS, "ignoreEos": True}
PROMPT = {"messages": [{"role": "user", "content": WORDS}]}
NOT_SERVED: dict[str, Any] = {
    "PurgeTenant": {},
}
STATUS_TIMES = 8
"""``buf curl`` exits with the number of the gRPC status, so many times."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a call printed: messages as JSON and, where it failed, its status and details by type."""

    exit_status: int
    messages: list[Any]
    failure: Any

    def detail(self, kind: type[Message]) -> Any:
        [value] = [d["value"] for d in self.failure["details"] if d["type"] == kind.DESCRIPTOR.full_name]
        return kind.FromString(base64.b64decode(value + "=" * (-len(value) % 4)))

    @property
    def reason(self) -> str:
        info = self.detail(error_details_pb2.ErrorInfo)
        assert info.domain == "alora_serve"
        return str(info.reason)


@dataclass(frozen=True, slots=True)
class Buf:
    """``buf curl`` to one router.

    Attributes:
        called: the methods called so far.
    """

    url: str
    flags: tuple[str, ...] = ("--http2-prior-knowledge",)
    called: set[str] = field(default_factory=set)

    async def call(self, method: str, request: Mapping[str, Any], *flags: str) -> Told:
        self.called.add(method)
        url = f"{self.url}/{SERVICE.full_name}/{method}"
        exit_status, printed, errors = await self.run("--data", "@-", *flags, url, given=json.dumps(request))
        return Told(exit_status, list(documents(printed)), json.loads(errors) if errors else None)

    async def run(self, *arguments: str, given: str = "") -> tuple[int, str, str]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(BUF, "curl", "--protocol", "grpc", *self.flags, *arguments), stdin=pipe, stdout=pipe, stderr=pipe
        )
        printed, errors = await process.communicate(given.encode())
        return await process.wait(), printed.decode(), errors.decode()


def documents(text: str) -> list[Any]:
    """JSON documents one after the other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def tokens(events: list[Any]) -> tuple[int, ...]:
    packed = b"".join(base64.b64decode(event["chunk"]["tokenIds"]) for event in events if "chunk" in event)
    return tuple(int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4))


@dataclass(frozen=True, slots=True)
class Calls:
    """All calls on the open router, by what they are to show, and the methods that were called."""

    told: Mapping[str, Told]
    called: set[str]

    def __getitem__(self, name: str) -> Told:
        return self.told[name]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def calls(serving: Deployed) -> Calls:
    buf, adapter = Buf(f"http://{serving.local.router_address}"), serving.model.appended
    prefilled = await buf.call("Prefill", {"prompt": PROMPT})
    base = await buf.call("Generate", {"prompt": PROMPT, "sampling": SAMPLING})
    more = {"handle": base.messages[-1]["event"]["finished"]["handle"], "messages": [{"role": "user", "content": MORE}]}
    by_handle = {"handle": prefilled.messages[0]["handle"]}
    targets = [{"adapter": adapter}, {}, {"adapter": "no-such-adapter"}]
    asked: list[tuple[str, str, Any]] = [
        ("continued", "Generate", {"prompt": more, "adapter": adapter, "sampling": SAMPLING}),
        ("by handle", "Generate", {"prompt": by_handle, "adapter": adapter, "sampling": SAMPLING}),
        ("fan-out", "FanOut", {"prompt": by_handle, "targets": targets, "sampling": SAMPLING}),
        ("listed", "ListAdapters", {}),
        ("loaded", "LoadAdapter", {"name": adapter}),
        ("unloaded", "UnloadAdapter", {"name": adapter}),
        ("model", "GetModel", {}),
        ("scored", "Score", {"prompt": PROMPT, "adapter": adapter, "continuations": ["yes"]}),
        ("tokenized", "Tokenize", {"prompt": PROMPT}),
        ("judged", "RunIntrinsic", {"prompt": PROMPT, "intrinsic": serving.model.answering}),
        ("judged together", "RunIntrinsics", {"prompt": PROMPT, "intrinsics": [serving.model.answering, adapter]}),
        ("bad fields", "Generate", {"prompt": PROMPT, "sampling": {"topP": 0, "temperature": -1}}),
        ("no prompt", "Prefill", {}),
        ("unknown", "LoadAdapter", {"name": "no-such-adapter"}),
        *((method, method, request) for method, request in NOT_SERVED.items()),
    ]
    told = {"prefilled": prefilled, "base": base}
    for name, method, request in asked:
        told[name] = await buf.call(method, request)
    return Calls(told, buf.called)


async def test_streams_bring_what_our_client_gets(serving: Deployed, calls: Calls) -> None:
    client, adapter = serving.client, serving.model.appended
    base = await client.generate(WORDS, sampling=GREEDY).result()
    continued = await client.generate(MORE, handle=base.handle, adapter=adapter, sampling=GREEDY).result()
    verdict = await client.generate(WORDS, adapter=adapter, sampling=GREEDY).result()
    for name, expected in {"base": base, "continued": continued, "by handle": verdict}.items():
        events = [message["event"] for message in calls[name].messages]
        assert ("started" in events[0], "finished" in events[-1]) == (True, True)
        assert tokens(events) == expected.token_ids
    results = calls["fan-out"].messages
    for index, expected in enumerate((verdict, base)):
        own = [message["event"] for message in results if message.get("index", 0) == index]
        assert tokens(own) == expected.token_ids
    [failure] = [message["failure"] for message in results if message.get("index") == 2]
    assert (failure["code"], failure["reason"]) == (5, "ADAPTER_NOT_FOUND")


async def test_unary_calls_bring_what_our_client_gets(serving: Deployed, calls: Calls) -> None:
    client, adapter = serving.client, serving.model.appended
    [prefilled], [listed], [loaded] = (calls[name].messages for name in ("prefilled", "listed", "loaded"))
    assert calls["tokenized"].messages[0]["prefixTokenIds"] == prefilled["handle"]["prefixTokenIds"]
    [scored] = (await client.score(WORDS, ["yes"], adapter=adapter)).scores
    assert calls["scored"].messages[0]["scores"][0]["logprobs"] == pytest.approx(scored.logprobs, abs=1e-4)
    packed = base64.b64decode(prefilled["handle"]["prefixTokenIds"])
    assert len(packed) == 4 * len((await client.prefill(WORDS)).handle.prefix_tokens)
    assert [found["name"] for found in listed["adapters"]] == [found.name for found in await client.list_adapters()]
    assert (loaded["adapter"]["name"], loaded["adapter"]["resident"]) == (adapter, True)
    assert calls["unloaded"].messages == [{"wasResident": True}]
    [told], model = calls["model"].messages, await client.get_model()
    assert (told["model"]["name"], told["model"]["contextTokens"]) == (model.name, model.context_tokens)


async def test_intrinsics_give_the_results_that_our_client_gets(serving: Deployed, calls: Calls) -> None:
    expected = await serving.client.run_intrinsic(WORDS, serving.model.answering)
    by_index = {message.get("index", 0): message for message in calls["judged together"].messages}
    assert by_index[1]["failure"]["reason"] == "INTRINSIC_UNDEFINED"
    for found in (calls["judged"].messages[0], by_index[0]["result"]):
        assert found["rawText"] == expected.raw_text
        assert found["result"] == {"likelihood": pytest.approx(expected.result["likelihood"], abs=1e-4)}


async def test_errors_arrive_with_their_details(calls: Calls) -> None:
    bad = calls["bad fields"]
    assert (bad.exit_status, bad.failure["code"], bad.reason) == (3 * STATUS_TIMES, "invalid_argument", REQUEST_INVALID)
    violations = bad.detail(error_details_pb2.BadRequest).field_violations
    assert {violation.field for violation in violations} == {"sampling.top_p", "sampling.temperature"}
    assert bad.detail(error_details_pb2.RequestInfo).request_id
    assert (calls["no prompt"].exit_status, calls["no prompt"].reason) == (3 * STATUS_TIMES, REQUEST_INVALID)
    assert (calls["unknown"].exit_status, calls["unknown"].reason) == (5 * STATUS_TIMES, "ADAPTER_NOT_FOUND")
    for method in NOT_SERVED:
        assert (calls[method].exit_status, calls[method].reason) == (12 * STATUS_TIMES, "FEATURE_UNIMPLEMENTED")


async def test_a_router_that_asks_for_tls_and_keys_says_who_may_do_what(serving: Deployed, guarded: Guarded) -> None:
    buf, adapter = Buf(f"https://{guarded.address}", ("--cacert", str(guarded.ca_file))), serving.model.appended

    async def call(tenant: str, method: str, request: Mapping[str, Any]) -> Told:
        header = ("--header", f"authorization: Bearer {guarded.keys[tenant]}") if tenant else ()
        return await buf.call(method, request, *header)

    nobody = await call("", "ListAdapters", {})
    assert (nobody.exit_status, nobody.reason) == (16 * STATUS_TIMES, "UNAUTHENTICATED")
    refused = await call("user", "LoadAdapter", {"name": adapter})
    assert (refused.exit_status, refused.reason) == (7 * STATUS_TIMES, "PERMISSION_REFUSED")
    assert (await call("admin", "LoadAdapter", {"name": adapter})).exit_status == 0
    async with guarded.client("small") as client:
        holding = client.generate(WORDS, max_tokens=1500, ignore_eos=True)
        await anext(aiter(holding))
        over = await call("small", "Generate", {"prompt": PROMPT})
        await holding.close()
    assert (over.exit_status, over.reason) == (8 * STATUS_TIMES, "OVERLOADED")
    assert over.detail(error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0


async def test_no_rpc_is_left_out(serving: Deployed, calls: Calls) -> None:
    methods = {method.name for method in SERVICE.methods}
    assert calls.called == methods
    answered = {name for name, told in calls.told.items() if told.exit_status == 0}
    assert NOT_SERVED.keys().isdisjoint(answered)
    url = f"http://{serving.local.router_address}"
    exit_status, printed, errors = await Buf(url).run("--list-methods", url)
    assert exit_status == 0, errors
    listed = {line.rpartition("/")[2] for line in printed.splitlines() if line.startswith(f"{SERVICE.full_name}/")}
    assert listed == methods
