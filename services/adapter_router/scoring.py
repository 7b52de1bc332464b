"""Has a worker score texts after a prepared conversation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from adapter_router.dispatch import Call, call_endpoint
from adapter_router.endpoints.endpoint import Endpoint
from adapter_router.policy import Demand
from adapter_router.prepare import Prepared
from adapter_router.usage import merged_timings, merged_usage
from alora_serve.rpc.convert import score_result_from_proto, score_to_proto
from alora_serve.types import ScoreRequest, ScoreResult
from alora_serve.v1 import adapter_decode_pb2 as decode_pb2

if TYPE_CHECKING:
    from adapter_router.peers import Workers, WorkerStub

SCORE: Final = "/alora_serve.v1.AdapterDecodeService/Score"


async def score_at_worker(
    workers: Workers,
    prepared: Prepared,
    adapter: str,
    continuations: tuple[str, ...],
    demand: Demand,
    *,
    call: Call,
    skip_store: bool,
    max_attempts: int,
) -> ScoreResult:
    """Scores of continuations, in order; usage and timings are of the whole call, the prefill's part included.

    A worker that is lost is replaced by another, which begins anew: nothing has been answered yet.

    Raises:
        UnavailableError: no worker could take it.
        AloraServeError: what the worker answered.
    """
    request = score_to_proto(
        ScoreRequest(prepared.handle, adapter, continuations, call.request_id, call.tenant, skip_store)
    )

    async def invoke(worker: Endpoint[WorkerStub]) -> decode_pb2.AdapterDecodeServiceScoreResponse:
        return await worker.stub.Score(request, timeout=call.remaining_seconds(), metadata=call.metadata)

    response = await call_endpoint(workers, demand, invoke, method=SCORE, max_attempts=max_attempts)
    result, prefill = score_result_from_proto(response), prepared.prefill
    return replace(
        result,
        usage=merged_usage(prefill, result.usage),
        timings=merged_timings(prefill, result.timings, first_token_seconds=0.0, total_seconds=call.elapsed_seconds()),
    )
