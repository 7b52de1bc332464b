"""Has a worker score texts after a conversation: prepared once, by whichever adapter was asked for."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from adapter_router.access.quotas import Quotas
from adapter_router.adapters import AdapterDirectory
from adapter_router.admission import BYTES_PER_TOKEN
from adapter_router.demands import Demands, is_plain_lora
from adapter_router.dispatch import Call, call_endpoint
from adapter_router.endpoints.endpoint import Endpoint
from adapter_router.prepare import Preparer
from adapter_router.usage import merged_timings, merged_usage
from alora_serve.errors import DeadlinePassedError
from alora_serve.rpc.convert import Scoring, score_result_from_proto, score_to_proto
from alora_serve.types import ScoreRequest, ScoreResult, Usage
from alora_serve.v1 import adapter_decode_pb2 as decode_pb2
from alora_serve.v1 import types_pb2

if TYPE_CHECKING:
    from adapter_router.peers import Workers, WorkerStub

SCORE: Final = "/alora_serve.v1.AdapterDecodeService/Score"


class ScoringWorkers:
    """Scores at the workers."""

    def __init__(
        self,
        workers: Workers,
        adapters: AdapterDirectory,
        preparer: Preparer,
        demands: Demands,
        quotas: Quotas,
        *,
        max_attempts: int,
    ) -> None:
        """Keep who scores.

        Args:
            workers: those who do.
            adapters: says of which kind an adapter is.
            preparer: prepares the conversations.
            demands: says what a score needs of a worker.
            quotas: charged with what workers ran; with a guess where who asked is gone before the worker answers.
            max_attempts: bounds the workers tried for one call.
        """
        self._workers = workers
        self._adapters = adapters
        self._preparer = preparer
        self._demands = demands
        self._quotas = quotas
        self._max_attempts = max_attempts

    async def score(self, scoring: Scoring, message: types_pb2.Prompt, *, call: Call) -> ScoreResult:
        """Scores of the continuations, in order; usage and timings are of the whole call, the prefill's part included.

        A worker that is lost is replaced by another, which begins anew: nothing has been answered yet.

        Args:
            scoring: what to score.
            message: its prompt as received; what base prefill gets.
            call: the public call.

        Raises:
            UnavailableError: nobody could take it.
            AloraServeError: what an endpoint answered.
        """
        adapter = self._adapters.find(scoring.adapter)
        prepared = await self._preparer.prepare(
            scoring.prompt, message, call=call, adapters=[scoring.adapter], tokenize_only=is_plain_lora(adapter)
        )
        wanted = ScoreRequest(
            prepared.handle,
            scoring.adapter,
            scoring.continuations,
            call.request_id,
            call.tenant,
            skip_store=not self._quotas.may_store(call.tenant),
        )
        request = score_to_proto(wanted)
        sent = asyncio.Event()

        async def invoke(worker: Endpoint[WorkerStub]) -> decode_pb2.AdapterDecodeServiceScoreResponse:
            timeout_seconds = call.remaining_seconds()
            sent.set()
            return await worker.stub.Score(request, timeout=timeout_seconds, metadata=call.metadata)

        demand = self._demands.generation(prepared.handle, adapter, call.tenant_salt)
        try:
            response = await call_endpoint(self._workers, demand, invoke, method=SCORE, max_attempts=self._max_attempts)
        except (asyncio.CancelledError, DeadlinePassedError):
            if sent.is_set():  # all may have run, and of a prompt what no prefill has been charged with
                run = sum(len(text.encode()) for text in scoring.continuations) // BYTES_PER_TOKEN
                self._quotas.charge(call.tenant, Usage(computed_tokens=demand.computed_tokens, generated_tokens=run))
            raise
        result, prefill = score_result_from_proto(response), prepared.prefill
        # What is scored has run as well, though nobody generated it.
        run = sum(len(score.token_ids) for score in result.scores)
        self._quotas.charge(call.tenant, replace(result.usage, generated_tokens=run))
        return replace(
            result,
            usage=merged_usage(prefill, result.usage),
            timings=merged_timings(
                prefill, result.timings, first_token_seconds=0.0, total_seconds=call.elapsed_seconds()
            ),
        )
