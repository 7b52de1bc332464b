"""Opens the streams of a prepared conversation: one of its own for each target."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from adapter_router.access.quotas import Quotas
from adapter_router.admission import RouterLimits
from adapter_router.demands import Demands, is_plain_lora
from adapter_router.dispatch import Call
from adapter_router.policy import Demand
from adapter_router.prepare import Prepared
from adapter_router.stream import DecodeStream
from alora_serve.metrics import RequestMetrics, RouterMetrics
from alora_serve.rpc.convert import Target
from alora_serve.types import AdapterInfo, GenerateRequest, PrefillResult

if TYPE_CHECKING:
    from adapter_router.peers import Workers

SEED_BITS: Final = 64


class StreamOpener:
    """Knows all that streams have in common."""

    def __init__(
        self,
        workers: Workers,
        demands: Demands,
        limits: RouterLimits,
        quotas: Quotas,
        *,
        router_metrics: RouterMetrics,
        request_metrics: RequestMetrics,
    ) -> None:
        """Keep who runs them, what bounds them and who is told."""
        self._workers = workers
        self._demands = demands
        self._limits = limits
        self._quotas = quotas
        self._router_metrics = router_metrics
        self._request_metrics = request_metrics

    def one(
        self,
        prepared: Prepared,
        target: Target,
        demand: Demand,
        call: Call,
        prefill: PrefillResult | None,
        seed: int | None = None,
    ) -> DecodeStream:
        """A stream of one target.

        Args:
            prepared: its conversation.
            target: who answers, and how.
            demand: what it needs of a worker.
            call: on whose behalf.
            prefill: what the conversation cost, if that is told as this stream's usage.
            seed: for a target without one; None draws it.
        """
        if target.sampling.seed is None:
            target = replace(target, sampling=replace(target.sampling, seed=_new_seed() if seed is None else seed))
        request = GenerateRequest(
            prepared.handle,
            target.adapter,
            target.sampling,
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

    def many(
        self, prepared: Prepared, targets: Sequence[Target], adapters: Mapping[int, AdapterInfo | None], call: Call
    ) -> list[DecodeStream]:
        """A stream a target, in order, all drawn to the same workers.

        What the one prefill cost is told with the first target that uses it, so that sums over targets are right.
        """
        seed = _new_seed()
        told = next((i for i, adapter in adapters.items() if not is_plain_lora(adapter)), min(adapters))
        demands = self._demands.fan_out(prepared.handle, list(adapters.values()), call.tenant_salt)
        return [
            self.one(prepared, targets[index], demand, call, prepared.prefill if index == told else None, seed)
            for index, demand in zip(adapters, demands, strict=True)
        ]


def _new_seed() -> int:
    return secrets.randbits(SEED_BITS)
