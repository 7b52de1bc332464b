"""Scripted base prefills and decode workers on real sockets, and a router in front of them.

For tests of what the router and the client do when peers are slow, full, gone or of another mind.
"""

# ruff: noqa: N802  # gRPC methods carry the names of the proto
from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from adapter_router.access.authentication import Access
from adapter_router.access.quotas import Quotas
from adapter_router.admission import RouterLimits
from adapter_router.demands import Demands
from adapter_router.endpoints.endpoint import EndpointOptions
from adapter_router.endpoints.pool import EndpointSet
from adapter_router.endpoints.resolver import Resolver
from adapter_router.peers import prefill_pool, worker_pool
from adapter_router.prefilling import Prefilling
from adapter_router.servicer import AloraServicer
from alora_serve.handles import HandleSigner
from alora_serve.kv.fingerprints import PrefixFingerprints
from alora_serve.kv.tenancy import TenantSalts
from alora_serve.metrics import RequestMetrics, RouterMetrics, RpcMetrics
from alora_serve.rpc.channels import server_options
from alora_serve.rpc.convert import (
    adapter_to_proto,
    decode_from_proto,
    endpoint_status_to_proto,
    event_to_proto,
    prefill_from_proto,
    prefill_result_to_internal_proto,
    score_from_proto,
    score_result_to_internal_proto,
)
from alora_serve.rpc.in_flight import InFlightCalls
from alora_serve.rpc.interceptors import WRITE_TIMEOUT_SECONDS, CallInterceptor
from alora_serve.types import (
    AdapterDigest,
    AdapterInfo,
    ContinuationScore,
    EndpointStatus,
    Finished,
    FinishReason,
    GenerateRequest,
    Heartbeat,
    ModelInfo,
    PrefillResult,
    PrefixHandle,
    Prompt,
    PromptKind,
    ScoreRequest,
    ScoreResult,
    Started,
    StreamEvent,
    Timings,
    TokenChunk,
    Usage,
)
from alora_serve.v1 import adapter_decode_pb2 as decode_pb2
from alora_serve.v1 import base_prefill_pb2 as prefill_pb2
from alora_serve.v1.adapter_decode_pb2_grpc import (
    AdapterDecodeServiceServicer,
    add_AdapterDecodeServiceServicer_to_server,
)
from alora_serve.v1.alora_pb2_grpc import AloraServiceStub, add_AloraServiceServicer_to_server
from alora_serve.v1.base_prefill_pb2_grpc import (
    BasePrefillServiceServicer,
    add_BasePrefillServiceServicer_to_server,
)

SECRET = b"a secret of the tests"
SALT = b"a salt of the tests"
SIGNER = HandleSigner([SECRET], b"", 3600)
PATIENCE_SECONDS = 20.0


def model(name: str = "m") -> ModelInfo:
    """A base model whose digest follows from its name."""
    digest = name.encode().ljust(32, b"\0")
    return ModelInfo(name, digest, b"s" * 32, "TinyForCausalLM", "float32", 256, 100, 16, 64)


def adapter(name: str, kind: str = "alora", *, problem: str = "", resident: bool = False) -> AdapterInfo:
    """An adapter as workers report it."""
    invocation = (7, 8) if kind == "alora" else ()
    return AdapterInfo(
        name, AdapterDigest(name.encode().hex()), kind, 8, ("q_proj",), invocation, "<x>", 10, resident, problem
    )


ADAPTERS = (adapter("jailbreak"), adapter("certainty"), adapter("plain", "lora"), adapter("broken", problem="use_dora"))


def handle(tokens: Sequence[int] = (1, 2, 3), *, model_name: str = "m", **changes: Any) -> PrefixHandle:
    """A signed handle of a closed conversation."""
    unsigned = PrefixHandle(
        model(model_name).model_digest, b"s" * 32, tuple(tokens), (9,), PromptKind.CONVERSATION, "user", False, 0
    )
    return SIGNER.sign(dataclasses.replace(unsigned, **changes))


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds; a test that waits for what never comes fails here."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # what is waited for knows nothing of its waiter
            await asyncio.sleep(0.005)


Script = Callable[[GenerateRequest, int], AsyncGenerator[StreamEvent, None]]
"""What a worker answers to a request and its attempt number."""


async def answer(request: GenerateRequest, attempt: int) -> AsyncGenerator[StreamEvent, None]:
    """Started, a heartbeat, two tokens of text or what a resumed stream lacks of them, Finished."""
    prompt_tokens = len(request.handle.prefix_tokens) + 1
    digest = AdapterDigest(request.adapter.encode().hex())
    yield Started(digest, None, request.sampling.seed or 0, prompt_tokens, request.handle.model_digest)
    yield Heartbeat()
    delivered = len(request.resume.generated_tokens) if request.resume else 0
    for chunk in (TokenChunk((10,), "Hello"), TokenChunk((11,), " world"))[delivered:]:
        yield chunk
    usage = Usage(
        prompt_tokens,
        cached_tokens=prompt_tokens - 1,
        fetched_tokens=prompt_tokens - 1,
        computed_tokens=1,
        generated_tokens=2,
        fetched_bytes=100,
        store_misses={"absent": 1},
    )
    timings = Timings(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    yield Finished(FinishReason.STOP, usage, timings, text="!", handle=None if request.adapter else request.handle)


class FakeService:
    """What both fakes share: a status that can be changed while it is watched."""

    def __init__(self, status: EndpointStatus) -> None:
        self.status = status
        self.watches = 0
        self._changed = asyncio.Event()

    def report(self, **changes: Any) -> None:
        """Change the status and tell every watcher."""
        self.status = dataclasses.replace(self.status, **changes)
        self.repeat()

    def repeat(self) -> None:
        """Tell the same status again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def statuses(self) -> AsyncIterator[EndpointStatus]:
        """As ``WatchStatus`` streams them, but told again only by :meth:`repeat`."""
        self.watches += 1
        while True:
            changed = self._changed
            yield self.status
            await changed.wait()


class FakePrefill(FakeService, BasePrefillServiceServicer):
    """A base prefill that tokenizes every message to one token."""

    def __init__(self, status: EndpointStatus | None = None) -> None:
        super().__init__(status or EndpointStatus(model()))
        self.requests: list[prefill_pb2.BasePrefillServicePrefillRequest] = []
        self.before: Callable[[], Awaitable[None]] | None = None

    async def Prefill(
        self, request: prefill_pb2.BasePrefillServicePrefillRequest, context: Any
    ) -> prefill_pb2.BasePrefillServicePrefillResponse:
        self.requests.append(request)
        if self.before is not None:
            await self.before()
        return prefill_result_to_internal_proto(self._result(prefill_from_proto(request), request.tokenize_only))

    def _result(self, prompt: Prompt, tokenize_only: bool) -> PrefillResult:
        before = prompt.handle.prefix_tokens if prompt.handle else prompt.token_ids
        tokens = (*before, *range(1, len(prompt.messages) + 1))
        computed = 0 if tokenize_only else len(tokens) - len(before)
        usage = Usage(
            len(tokens),
            cached_tokens=len(tokens) - computed,
            computed_tokens=computed,
            stored_bytes=1000,
            fetched_bytes=10,
            store_drops={"full": 2},
        )
        signed = handle(tokens, model_name=self.status.model.name)
        return PrefillResult(signed, usage, Timings(queue_seconds=1.0, fetch_seconds=2.0, prefill_seconds=4.0))

    async def WatchStatus(
        self, request: prefill_pb2.BasePrefillServiceWatchStatusRequest, context: Any
    ) -> AsyncIterator[prefill_pb2.BasePrefillServiceWatchStatusResponse]:
        async for status in self.statuses():
            yield prefill_pb2.BasePrefillServiceWatchStatusResponse(status=endpoint_status_to_proto(status))


class FakeWorker(FakeService, AdapterDecodeServiceServicer):
    """A decode worker that follows a script. ``cancelled`` counts streams that ended before their script did."""

    def __init__(
        self, script: Script = answer, status: EndpointStatus | None = None, *, prefill: FakePrefill | None = None
    ) -> None:
        """``prefill``: what it serves as a base prefill, besides."""
        super().__init__(status or EndpointStatus(model(), adapters=ADAPTERS))
        self.prefill = prefill
        self.script = script
        self.requests: list[decode_pb2.DecodeRequest] = []
        self.cancelled = 0
        self.loaded: list[str] = []
        self.scored: list[ScoreRequest] = []
        self.unloaded: list[str] = []
        self.definitions: dict[str, bytes] = {}
        self.defined: list[str] = []
        self.refusal: Exception | None = None
        self.free = asyncio.Event()
        """Cleared, whoever unloads an adapter or asks for a definition waits."""
        self.free.set()
        self.remaining_seconds: list[float] = []
        self.request_ids: list[str] = []

    async def Decode(self, request: decode_pb2.DecodeRequest, context: Any) -> AsyncIterator[decode_pb2.DecodeResponse]:
        self.requests.append(request)
        self.remaining_seconds.append(context.time_remaining())
        self.request_ids += [str(value) for key, value in context.invocation_metadata() if key == "x-request-id"]
        wanted = decode_from_proto(request)
        first_index = len(wanted.resume.generated_tokens) if wanted.resume else 0
        try:
            async for event in self.script(wanted, request.attempt):
                message = event_to_proto(event, attempt=request.attempt, first_index=first_index)
                yield decode_pb2.DecodeResponse(event=message)
                first_index += len(event.token_ids) if isinstance(event, TokenChunk) else 0
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    async def Score(
        self, request: decode_pb2.AdapterDecodeServiceScoreRequest, context: Any
    ) -> decode_pb2.AdapterDecodeServiceScoreResponse:
        """A token and -1 for each character."""
        wanted = score_from_proto(request)
        self.scored.append(wanted)
        scores = (ContinuationScore(tuple(map(ord, text)), (-1.0,) * len(text)) for text in wanted.continuations)
        prompt_tokens = len(wanted.handle.prefix_tokens)
        usage = Usage(prompt_tokens, cached_tokens=prompt_tokens)
        return score_result_to_internal_proto(ScoreResult(tuple(scores), usage, Timings(queue_seconds=0.5)))

    async def LoadAdapter(
        self, request: decode_pb2.AdapterDecodeServiceLoadAdapterRequest, context: Any
    ) -> decode_pb2.AdapterDecodeServiceLoadAdapterResponse:
        self.loaded.append(request.name)
        loaded = next(info for info in self.status.adapters if info.name == request.name)
        return decode_pb2.AdapterDecodeServiceLoadAdapterResponse(
            adapter=adapter_to_proto(dataclasses.replace(loaded, resident=True))
        )

    async def UnloadAdapter(
        self, request: decode_pb2.AdapterDecodeServiceUnloadAdapterRequest, context: Any
    ) -> decode_pb2.AdapterDecodeServiceUnloadAdapterResponse:
        self.unloaded.append(request.name)
        await self.free.wait()
        if self.refusal is not None:
            raise self.refusal
        return decode_pb2.AdapterDecodeServiceUnloadAdapterResponse(was_resident=request.name in self.loaded)

    async def GetIntrinsic(
        self, request: decode_pb2.AdapterDecodeServiceGetIntrinsicRequest, context: Any
    ) -> decode_pb2.AdapterDecodeServiceGetIntrinsicResponse:
        self.defined.append(request.name)
        await self.free.wait()
        return decode_pb2.AdapterDecodeServiceGetIntrinsicResponse(io_yaml=self.definitions[request.name])

    def define(self, name: str, io_yaml: str) -> None:
        """Give an adapter a definition, and tell of it."""
        self.definitions[name] = io_yaml.encode()
        digest = hashlib.sha256(io_yaml.encode()).hexdigest()
        self.report(
            adapters=tuple(
                dataclasses.replace(info, intrinsic_digest=digest) if info.name == name else info
                for info in self.status.adapters
            )
        )

    async def ListAdapters(
        self, request: decode_pb2.AdapterDecodeServiceListAdaptersRequest, context: Any
    ) -> decode_pb2.AdapterDecodeServiceListAdaptersResponse:
        return decode_pb2.AdapterDecodeServiceListAdaptersResponse(adapters=map(adapter_to_proto, self.status.adapters))

    async def WatchStatus(
        self, request: decode_pb2.AdapterDecodeServiceWatchStatusRequest, context: Any
    ) -> AsyncIterator[decode_pb2.AdapterDecodeServiceWatchStatusResponse]:
        async for status in self.statuses():
            yield decode_pb2.AdapterDecodeServiceWatchStatusResponse(status=endpoint_status_to_proto(status))


@dataclass
class Server:
    """A running server. :meth:`kill` ends it as a crash would: connections break, nothing is finished."""

    address: str
    grpc_server: grpc.aio.Server

    async def kill(self) -> None:
        await self.grpc_server.stop(None)


async def start_server(
    register: Callable[[grpc.aio.Server], None], address: str = "127.0.0.1:0", **interceptor_options: Any
) -> Server:
    """Serve with the interceptor of the real services."""
    interceptor = CallInterceptor(RpcMetrics(CollectorRegistry()), InFlightCalls(), **interceptor_options)
    server = grpc.aio.server(interceptors=[interceptor], options=server_options())
    register(server)
    port = server.add_insecure_port(address)
    await server.start()
    return Server(f"{address.rpartition(':')[0]}:{port}", server)


async def start_prefill(prefill: FakePrefill, address: str = "127.0.0.1:0") -> Server:
    """Serve a fake base prefill."""
    return await start_server(partial(add_BasePrefillServiceServicer_to_server, prefill), address)


async def start_worker(worker: FakeWorker, address: str = "127.0.0.1:0") -> Server:
    """Serve a fake decode worker."""

    def register(server: grpc.aio.Server) -> None:
        add_AdapterDecodeServiceServicer_to_server(worker, server)
        if worker.prefill is not None:
            add_BasePrefillServiceServicer_to_server(worker.prefill, server)

    return await start_server(register, address)


@dataclass
class Names:
    """A resolver whose answers a test changes."""

    known: dict[str, set[str]] = field(default_factory=dict)

    async def __call__(self, target: str) -> frozenset[str]:
        return frozenset(self.known.get(target, {target}))


FAST = EndpointOptions(resolve_seconds=0.05, silence_seconds=5.0, wait_seconds=1.0)


@dataclass
class Router:
    """A running router."""

    address: str
    stub: Any
    prefills: EndpointSet[Any]
    workers: EndpointSet[Any]
    registry: CollectorRegistry
    names: Names

    async def settled(self, prefills: int, workers: int) -> None:
        """Wait until so many endpoints are healthy."""
        await until(lambda: healthy(self.prefills) == prefills and healthy(self.workers) == workers)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def healthy(endpoints: EndpointSet[Any]) -> int:
    """How many endpoints may be picked as far as health goes."""
    return sum(snapshot.healthy for snapshot in endpoints.snapshots())


@asynccontextmanager
async def endpoint_sets(
    prefill_targets: Sequence[str],
    worker_targets: Sequence[str],
    *,
    options: EndpointOptions = FAST,
    resolve: Resolver,
    metrics: RouterMetrics,
) -> AsyncIterator[tuple[EndpointSet[Any], EndpointSet[Any]]]:
    """Both pools, started."""
    prefills = prefill_pool(prefill_targets, options, metrics, on_change=lambda: None, resolve=resolve)
    workers = worker_pool(worker_targets, options, metrics, on_change=lambda: None, resolve=resolve)
    async with prefills, workers:
        yield prefills, workers


@asynccontextmanager
async def router_on(
    prefill_targets: Sequence[str],
    worker_targets: Sequence[str],
    *,
    options: EndpointOptions = FAST,
    limits: RouterLimits | None = None,
    names: Names | None = None,
    write_timeout_seconds: float = WRITE_TIMEOUT_SECONDS,
    quotas: Quotas | None = None,
    access: Access | None = None,
    workers_prefill: bool = False,
) -> AsyncIterator[Router]:
    """A router in front of these targets."""
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    names = names or Names()
    async with AsyncExitStack() as stack:
        prefills, workers = await stack.enter_async_context(
            endpoint_sets(prefill_targets, worker_targets, options=options, resolve=names, metrics=metrics)
        )
        limits = limits or RouterLimits()
        prefilling = Prefilling(prefills, workers, max_attempts=limits.max_attempts, workers_prefill=workers_prefill)
        servicer = AloraServicer(
            prefilling,
            workers,
            SIGNER,
            limits,
            demands=Demands(PrefixFingerprints(b"")),
            salts=TenantSalts(SALT),
            quotas=quotas or Quotas(),
            router_metrics=metrics,
            request_metrics=RequestMetrics(registry),
        )
        register = partial(add_AloraServiceServicer_to_server, servicer)
        server = await start_server(
            register,
            max_message_bytes=servicer.max_message_bytes,
            write_timeout_seconds=write_timeout_seconds,
            authorize=access.authorize if access else None,
        )
        stack.push_async_callback(server.kill)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        yield Router(server.address, AloraServiceStub(channel), prefills, workers, registry, names)


@asynccontextmanager
async def deployment(
    prefills: Sequence[FakePrefill], workers: Sequence[FakeWorker], **router: Any
) -> AsyncIterator[tuple[Router, list[Server]]]:
    """Servers for these fakes and a router that sees all of them healthy; the servers in order, prefills first."""
    servers = [await start_prefill(prefill) for prefill in prefills]
    servers += [await start_worker(worker) for worker in workers]
    addresses = [server.address for server in servers]
    try:
        async with router_on(addresses[: len(prefills)], addresses[len(prefills) :], **router) as running:
            await running.settled(len(prefills), len(workers))
            yield running, servers
    finally:
        for server in servers:
            await server.kill()
