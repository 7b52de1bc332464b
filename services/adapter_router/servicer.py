"""The public API: checks a call, prepares its conversation, and forwards what workers answer."""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

import structlog
from google.protobuf.message import Message
from grpc import aio

from adapter_router.access.quotas import Quotas
from adapter_router.adapters import AdapterDirectory
from adapter_router.catalog import paired_models, prevailing_model
from adapter_router.definitions import Definitions
from adapter_router.demands import Demands, is_plain_lora
from adapter_router.dispatch import Call
from adapter_router.intrinsics import Intrinsics
from adapter_router.merge import merge_samples, merge_streams
from adapter_router.policy import Demand
from adapter_router.prepare import Prepared, Preparer
from adapter_router.scoring import ScoringWorkers
from adapter_router.stream import DecodeStream
from alora_serve.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    AloraServeError,
    IntrinsicOutputError,
    OverloadedError,
    UnimplementedFeatureError,
)
from alora_serve.handles import HandleSigner
from alora_serve.kv.tenancy import TenantSalts
from alora_serve.metrics import RequestMetrics, RouterMetrics
from alora_serve.rpc.caller import CALLER
from alora_serve.rpc.channels import DEFAULT_MESSAGE_BYTES, message_bytes_for_context
from alora_serve.rpc.convert import (
    MAX_SAMPLES,
    Target,
    adapter_name_from_proto,
    adapter_to_proto,
    fan_out_from_proto,
    generate_from_proto,
    intrinsic_result_to_proto,
    model_to_proto,
    prefill_from_proto,
    prefill_result_to_proto,
    prompt_from_proto,
    run_intrinsic_from_proto,
    run_intrinsics_from_proto,
    score_result_to_proto,
    scoring_from_proto,
    tokenized_to_proto,
)
from alora_serve.rpc.status import failure_to_proto
from alora_serve.types import AdapterInfo, GenerateRequest, IntrinsicResult, ModelInfo, PrefillResult
from alora_serve.v1 import alora_pb2, types_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceServicer

if TYPE_CHECKING:
    from adapter_router.peers import Workers
    from adapter_router.prefilling import Prefilling

Context = aio.ServicerContext[Any, Any]

SEED_BITS = 64
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Bounds on what one router does.

    Attributes:
        max_attempts: endpoints tried in a row that get a request no further.
        max_in_flight: requests at once before RESOURCE_EXHAUSTED; a fan-out is one.
        default_deadline_seconds: of calls whose client set none.
        silence_seconds: after so long without an event a stream's worker is lost.
        resume_wait_seconds: longest wait of a stream that has begun for a worker that can go on with it.
    """

    max_attempts: int = 3
    max_in_flight: int = 1000
    default_deadline_seconds: float = 600.0
    silence_seconds: float = 3.0
    resume_wait_seconds: float = 30.0


class AloraServicer(AloraServiceServicer):
    """Implements ``AloraService`` over the live endpoints. Errors are raised as ours; the server translates them."""

    def __init__(
        self,
        prefilling: Prefilling,
        workers: Workers,
        signer: HandleSigner,
        limits: RouterLimits,
        *,
        demands: Demands,
        salts: TenantSalts,
        quotas: Quotas,
        router_metrics: RouterMetrics,
        request_metrics: RequestMetrics,
    ) -> None:
        """Keep who does what.

        Args:
            prefilling: calls whoever prefills.
            workers: decode workers.
            signer: verifies clients' handles.
            limits: see :class:`RouterLimits`.
            demands: says what calls need of endpoints.
            salts: keeps tenants' handles and KV apart.
            quotas: holds tenants to theirs.
            router_metrics: told of requests.
            request_metrics: told what they cost.
        """
        self._router_metrics = router_metrics
        self._request_metrics = request_metrics
        self._prefilling = prefilling
        self._workers = workers
        self._limits = limits
        self._demands = demands
        self._salts = salts
        self._quotas = quotas
        self._preparer = Preparer(prefilling, workers, signer, demands, quotas)
        self._adapters = AdapterDirectory(workers, max_attempts=limits.max_attempts)
        self._scoring = ScoringWorkers(
            workers, self._adapters, self._preparer, demands, max_attempts=limits.max_attempts
        )
        self._intrinsics = Intrinsics(
            self._adapters,
            Definitions(workers),
            self._preparer,
            demands,
            open_stream=lambda prepared, target, demand, call, prefill: self._stream(
                prepared, target, demand, call, _new_seed(), prefill
            ),
            takes_documents=lambda: self._model().takes_documents,
        )
        self._in_flight = 0

    # --- generation ---------------------------------------------------------------------------------------------------

    async def Generate(
        self, request: alora_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[alora_pb2.GenerateResponse, None]:
        """One conversation, one adapter or the base model; one sample or several."""
        sequences = min(max(request.sampling.n, 1), MAX_SAMPLES)
        with self._admitted(context, request, sequences=sequences) as call:
            prompt, samples = generate_from_proto(request)
            asked = {index: sample for index, sample in enumerate(samples) if not sample.is_skipped}
            if not asked:
                return
            adapter = self._adapters.find(request.adapter)
            prepared = await self._preparer.prepare(
                prompt, request.prompt, call=call, adapter=request.adapter, tokenize_only=is_plain_lora(adapter)
            )
            if len(samples) == 1:
                demand = self._demands.generation(prepared.handle, adapter, call.tenant_salt)
                streams = [self._stream(prepared, samples[0], demand, call, _new_seed(), prepared.prefill)]
            else:
                streams = self._fan_out_streams(prepared, samples, dict.fromkeys(asked, adapter), call)
            async with aclosing(merge_samples([stream.events() for stream in streams], list(asked))) as events:
                async for event in events:
                    yield alora_pb2.GenerateResponse(event=event)

    async def FanOut(
        self, request: alora_pb2.FanOutRequest, context: Context
    ) -> AsyncGenerator[alora_pb2.FanOutResponse, None]:
        """One conversation, many targets: one prefill, then their streams as they come."""
        with self._admitted(context, request, sequences=len(request.targets)) as call:
            fan_out = fan_out_from_proto(request)
            adapters: dict[int, AdapterInfo | None] = {}
            asked = {index: target for index, target in enumerate(fan_out.targets) if not target.is_skipped}
            for index, target in asked.items():
                try:
                    adapters[index] = self._adapters.find(target.adapter)
                except (AdapterNotFoundError, AdapterRefusedError) as error:
                    yield alora_pb2.FanOutResponse(index=index, failure=failure_to_proto(error))
            if not adapters:
                return
            prepared = await self._preparer.prepare(
                fan_out.prompt, request.prompt, call=call, tokenize_only=all(map(is_plain_lora, adapters.values()))
            )
            indexes = list(adapters)
            streams = self._fan_out_streams(prepared, fan_out.targets, adapters, call)
            async with aclosing(merge_streams([stream.events() for stream in streams])) as merged:
                async for position, item in merged:
                    yield _fan_out_response(indexes[position], item)

    def _fan_out_streams(
        self, prepared: Prepared, targets: Sequence[Target], adapters: dict[int, AdapterInfo | None], call: Call
    ) -> list[DecodeStream]:
        """A stream a target, in order, all drawn to the same workers.

        What the one prefill cost is charged to the first target that uses it, so that sums over targets are right.
        """
        seed = _new_seed()
        charged = next((i for i, adapter in adapters.items() if not is_plain_lora(adapter)), min(adapters))
        demands = self._demands.fan_out(prepared.handle, list(adapters.values()), call.tenant_salt)
        return [
            self._stream(
                prepared,
                targets[index],
                demand,
                call,
                seed,
                prepared.prefill if index == charged else None,
            )
            for index, demand in zip(adapters, demands, strict=True)
        ]

    def _stream(
        self,
        prepared: Prepared,
        target: Target,
        demand: Demand,
        call: Call,
        seed: int,
        prefill: PrefillResult | None,
    ) -> DecodeStream:
        sampling = target.sampling if target.sampling.seed is not None else replace(target.sampling, seed=seed)
        request = GenerateRequest(
            prepared.handle,
            target.adapter,
            sampling,
            target.resume,
            call.request_id,
            call.tenant,
            skip_store=not self._quotas.may_store(call.tenant),
        )
        self._router_metrics.requested(target.adapter)
        return DecodeStream(
            self._workers,
            request,
            demand,
            call=call,
            prefill=prefill,
            max_attempts=self._limits.max_attempts,
            silence_seconds=self._limits.silence_seconds,
            resume_wait_seconds=self._limits.resume_wait_seconds,
            metrics=self._request_metrics,
            charge=partial(self._quotas.charge, call.tenant),
        )

    async def Prefill(self, request: alora_pb2.PrefillRequest, context: Context) -> alora_pb2.PrefillResponse:
        """Warm a conversation."""
        with self._admitted(context, request, sequences=1) as call:
            prompt = prefill_from_proto(request)
            result = await self._preparer.prefill(prompt, request.prompt, call=call)
            self._quotas.charge(call.tenant, result.usage)
            return prefill_result_to_proto(result)

    async def Score(self, request: alora_pb2.ScoreRequest, context: Context) -> alora_pb2.ScoreResponse:
        """One conversation, one adapter or the base model, many texts to score."""
        with self._admitted(context, request, sequences=len(request.continuations)) as call:
            scoring, may_store = scoring_from_proto(request), self._quotas.may_store(call.tenant)
            result = await self._scoring.score(scoring, request.prompt, call=call, skip_store=not may_store)
            self._router_metrics.requested(scoring.adapter)
            self._request_metrics.record(result.usage, result.timings)
            # What is scored has run as well, though nobody generated it.
            run = sum(len(score.token_ids) for score in result.scores)
            self._quotas.charge(call.tenant, replace(result.usage, generated_tokens=run))
            return score_result_to_proto(result)

    async def Tokenize(self, request: alora_pb2.TokenizeRequest, context: Context) -> alora_pb2.TokenizeResponse:
        """Look at a conversation's tokens."""
        with self._admitted(context, request, sequences=0) as call:
            prompt = prompt_from_proto(request.prompt)
            return tokenized_to_proto(await self._preparer.tokenize(prompt, request.prompt, call=call))

    # --- intrinsics ---------------------------------------------------------------------------------------------------

    async def RunIntrinsic(
        self, request: alora_pb2.RunIntrinsicRequest, context: Context
    ) -> alora_pb2.RunIntrinsicResponse:
        """One intrinsic on one conversation."""
        with self._admitted(context, request, sequences=1) as call:
            return intrinsic_result_to_proto(await self._intrinsics.run_one(run_intrinsic_from_proto(request), call))

    async def RunIntrinsics(
        self, request: alora_pb2.RunIntrinsicsRequest, context: Context
    ) -> AsyncGenerator[alora_pb2.RunIntrinsicsResponse, None]:
        """One conversation, many intrinsics: results as they come."""
        with self._admitted(context, request, sequences=len(request.intrinsics)) as call:
            async with aclosing(self._intrinsics.run(run_intrinsics_from_proto(request), call)) as results:
                async for index, result in results:
                    yield _intrinsics_response(index, result)

    # --- adapters and model -------------------------------------------------------------------------------------------

    async def ListAdapters(
        self, request: alora_pb2.ListAdaptersRequest, context: Context
    ) -> alora_pb2.ListAdaptersResponse:
        """Merged over workers."""
        return alora_pb2.ListAdaptersResponse(adapters=map(adapter_to_proto, self._adapters.list()))

    async def LoadAdapter(
        self, request: alora_pb2.LoadAdapterRequest, context: Context
    ) -> alora_pb2.LoadAdapterResponse:
        """On the preferred worker."""
        adapter = await self._adapters.load(adapter_name_from_proto(request), self._call(context))
        return alora_pb2.LoadAdapterResponse(adapter=adapter_to_proto(adapter))

    async def UnloadAdapter(
        self, request: alora_pb2.UnloadAdapterRequest, context: Context
    ) -> alora_pb2.UnloadAdapterResponse:
        """On all workers."""
        was_resident = await self._adapters.unload(adapter_name_from_proto(request), self._call(context))
        return alora_pb2.UnloadAdapterResponse(was_resident=was_resident)

    async def GetModel(self, request: alora_pb2.GetModelRequest, context: Context) -> alora_pb2.GetModelResponse:
        """The base model."""
        return alora_pb2.GetModelResponse(model=model_to_proto(self._model()))

    def _model(self) -> ModelInfo:
        served = paired_models(self._prefilling.snapshots(), self._workers.snapshots())
        return prevailing_model(self._prefilling.models(), self._workers.models(), served)

    def max_message_bytes(self) -> int:
        """The largest request that a model behind this router takes, as far as its endpoints have reported."""
        contexts = [model.context_tokens for model in (*self._prefilling.models(), *self._workers.models())]
        return message_bytes_for_context(max(contexts)) if contexts else DEFAULT_MESSAGE_BYTES

    # --- not served yet -----------------------------------------------------------------------------------------------

    async def PurgeTenant(
        self, request: alora_pb2.PurgeTenantRequest, context: Context
    ) -> alora_pb2.PurgeTenantResponse:
        """Not served yet."""
        _refuse("PurgeTenant")

    # --- calls --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _admitted(self, context: Context, request: Message, *, sequences: int) -> Iterator[Call]:
        """Count a call among those in flight, or refuse it at once rather than queue without bound."""
        if self._in_flight >= self._limits.max_in_flight:
            raise OverloadedError(
                f"the router holds {self._in_flight} requests, as many as it takes; retry later",
                # Spread, so that those refused together do not come back together.
                retry_after_seconds=random.uniform(0.5, 1.5),
            )
        call = self._call(context)
        # Not tokenized yet: four bytes a token, as text has on average and packed ids have exactly.
        prompt_tokens = request.ByteSize() // BYTES_PER_TOKEN
        with self._quotas.hold(call.tenant, sequences=sequences, prompt_tokens=prompt_tokens):
            self._count(+1)
            try:
                yield call
            finally:
                self._count(-1)

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._router_metrics.in_flight(self._in_flight)

    def _call(self, context: Context) -> Call:
        remaining = cast("float | None", context.time_remaining())  # the stubs forget calls without a deadline
        within_seconds = self._limits.default_deadline_seconds if remaining is None else remaining
        # The server's interceptor has bound the id that the client gave or a new one.
        tenant = CALLER.get().tenant
        return Call.arriving(
            structlog.contextvars.get_contextvars()["request_id"], within_seconds, tenant, self._salts.of(tenant)
        )


def _new_seed() -> int:
    return secrets.randbits(SEED_BITS)


def _fan_out_response(index: int, item: types_pb2.GenerationEvent | AloraServeError) -> alora_pb2.FanOutResponse:
    if isinstance(item, AloraServeError):
        return alora_pb2.FanOutResponse(index=index, failure=failure_to_proto(item))
    return alora_pb2.FanOutResponse(index=index, event=item)


def _intrinsics_response(index: int, result: IntrinsicResult | AloraServeError) -> alora_pb2.RunIntrinsicsResponse:
    try:
        if not isinstance(result, AloraServeError):
            return alora_pb2.RunIntrinsicsResponse(index=index, result=intrinsic_result_to_proto(result))
    except IntrinsicOutputError as error:
        result = error
    return alora_pb2.RunIntrinsicsResponse(index=index, failure=failure_to_proto(result))


def _refuse(method: str) -> NoReturn:
    raise UnimplementedFeatureError(f"AloraService.{method} is not served by this release")
