"""The public API: checks a call, prepares its conversation, and forwards what workers answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from adapter_router.access.quotas import Quotas
from adapter_router.adapters import AdapterDirectory
from adapter_router.admission import Admission, Context, RouterLimits
from adapter_router.catalog import paired_models, prevailing_model
from adapter_router.definitions import Definitions
from adapter_router.demands import Demands, is_plain_lora
from adapter_router.intrinsics import Intrinsics
from adapter_router.merge import merge_samples, merge_streams
from adapter_router.opening import StreamOpener
from adapter_router.prepare import Preparer, begun_model
from adapter_router.scoring import ScoringWorkers
from alora_serve.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    AloraServeError,
    IntrinsicOutputError,
    UnimplementedFeatureError,
)
from alora_serve.handles import HandleSigner
from alora_serve.kv.tenancy import TenantSalts
from alora_serve.metrics import RequestMetrics, RouterMetrics
from alora_serve.rpc.caller import CALLER
from alora_serve.rpc.channels import DEFAULT_MESSAGE_BYTES, message_bytes_for_context
from alora_serve.rpc.convert import (
    MAX_SAMPLES,
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
from alora_serve.types import AdapterInfo, IntrinsicResult, ModelInfo
from alora_serve.v1 import alora_pb2, types_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceServicer

if TYPE_CHECKING:
    from adapter_router.peers import Workers
    from adapter_router.prefilling import Prefilling


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
        self._demands = demands
        self._admission = Admission(limits, salts, quotas, router_metrics)
        self._streams = StreamOpener(
            workers, demands, limits, quotas, router_metrics=router_metrics, request_metrics=request_metrics
        )
        self._preparer = Preparer(prefilling, workers, signer, demands, quotas)
        self._adapters = AdapterDirectory(workers, max_attempts=limits.max_attempts)
        self._scoring = ScoringWorkers(
            workers, self._adapters, self._preparer, demands, quotas, max_attempts=limits.max_attempts
        )
        self._intrinsics = Intrinsics(
            self._adapters,
            Definitions(workers),
            self._preparer,
            demands,
            open_stream=self._streams.one,
            takes_documents=lambda: self._model().takes_documents,
        )

    # --- generation ---------------------------------------------------------------------------------------------------

    async def Generate(
        self, request: alora_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[alora_pb2.GenerateResponse, None]:
        """One conversation, one adapter or the base model; one sample or several."""
        sequences = min(max(request.sampling.n, 1), MAX_SAMPLES)
        with self._admission.admitted(context, request, sequences=sequences) as call:
            prompt, samples = generate_from_proto(request)
            asked = {index: sample for index, sample in enumerate(samples) if not sample.is_skipped}
            if not asked:
                return
            adapter = self._adapters.find(request.adapter)
            prepared = await self._preparer.prepare(
                prompt,
                request.prompt,
                call=call,
                adapters=[request.adapter],
                tokenize_only=is_plain_lora(adapter),
                begun_with=begun_model(asked.values()),
            )
            if len(samples) == 1:
                demand = self._demands.generation(prepared.handle, adapter, call.tenant_salt)
                streams = [self._streams.one(prepared, samples[0], demand, call, prepared.prefill)]
            else:
                streams = self._streams.many(prepared, samples, dict.fromkeys(asked, adapter), call)
            async with aclosing(merge_samples([stream.events() for stream in streams], list(asked))) as events:
                async for event in events:
                    yield alora_pb2.GenerateResponse(event=event)

    async def FanOut(
        self, request: alora_pb2.FanOutRequest, context: Context
    ) -> AsyncGenerator[alora_pb2.FanOutResponse, None]:
        """One conversation, many targets: one prefill, then their streams as they come."""
        with self._admission.admitted(context, request, sequences=len(request.targets)) as call:
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
                fan_out.prompt,
                request.prompt,
                call=call,
                adapters=[asked[index].adapter for index in adapters],
                tokenize_only=all(map(is_plain_lora, adapters.values())),
                begun_with=begun_model(asked.values()),
            )
            indexes = list(adapters)
            streams = self._streams.many(prepared, fan_out.targets, adapters, call)
            async with aclosing(merge_streams([stream.events() for stream in streams])) as merged:
                async for position, item in merged:
                    yield _fan_out_response(indexes[position], item)

    async def Prefill(self, request: alora_pb2.PrefillRequest, context: Context) -> alora_pb2.PrefillResponse:
        """Warm a conversation."""
        with self._admission.admitted(context, request, sequences=1) as call:
            prompt = prefill_from_proto(request)
            result = await self._preparer.prefill(prompt, request.prompt, call=call)
            return prefill_result_to_proto(result)

    async def Score(self, request: alora_pb2.ScoreRequest, context: Context) -> alora_pb2.ScoreResponse:
        """One conversation, one adapter or the base model, many texts to score."""
        with self._admission.admitted(context, request, sequences=len(request.continuations)) as call:
            scoring = scoring_from_proto(request)
            result = await self._scoring.score(scoring, request.prompt, call=call)
            self._router_metrics.requested(scoring.adapter)
            self._request_metrics.record(result.usage, result.timings)
            return score_result_to_proto(result)

    async def Tokenize(self, request: alora_pb2.TokenizeRequest, context: Context) -> alora_pb2.TokenizeResponse:
        """Look at a conversation's tokens."""
        with self._admission.admitted(context, request, sequences=0) as call:
            prompt = prompt_from_proto(request.prompt)
            return tokenized_to_proto(await self._preparer.tokenize(prompt, request.prompt, call=call))

    # --- intrinsics ---------------------------------------------------------------------------------------------------

    async def RunIntrinsic(
        self, request: alora_pb2.RunIntrinsicRequest, context: Context
    ) -> alora_pb2.RunIntrinsicResponse:
        """One intrinsic on one conversation."""
        with self._admission.admitted(context, request, sequences=1) as call:
            return intrinsic_result_to_proto(await self._intrinsics.run_one(run_intrinsic_from_proto(request), call))

    async def RunIntrinsics(
        self, request: alora_pb2.RunIntrinsicsRequest, context: Context
    ) -> AsyncGenerator[alora_pb2.RunIntrinsicsResponse, None]:
        """One conversation, many intrinsics: results as they come."""
        with self._admission.admitted(context, request, sequences=len(request.intrinsics)) as call:
            async with aclosing(self._intrinsics.run(run_intrinsics_from_proto(request), call)) as results:
                async for index, result in results:
                    yield _intrinsics_response(index, result)

    # --- adapters and model -------------------------------------------------------------------------------------------

    async def ListAdapters(
        self, request: alora_pb2.ListAdaptersRequest, context: Context
    ) -> alora_pb2.ListAdaptersResponse:
        """Merged over workers. Which are in memory tells who else has used them lately: that is for administrators."""
        listed = self._adapters.list()
        if "admin" not in CALLER.get().roles:
            listed = [replace(adapter, resident=False) for adapter in listed]
        return alora_pb2.ListAdaptersResponse(adapters=map(adapter_to_proto, listed))

    async def LoadAdapter(
        self, request: alora_pb2.LoadAdapterRequest, context: Context
    ) -> alora_pb2.LoadAdapterResponse:
        """On the preferred worker."""
        adapter = await self._adapters.load(adapter_name_from_proto(request), self._admission.call(context))
        return alora_pb2.LoadAdapterResponse(adapter=adapter_to_proto(adapter))

    async def UnloadAdapter(
        self, request: alora_pb2.UnloadAdapterRequest, context: Context
    ) -> alora_pb2.UnloadAdapterResponse:
        """On all workers."""
        was_resident = await self._adapters.unload(adapter_name_from_proto(request), self._admission.call(context))
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
