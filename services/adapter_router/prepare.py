"""Turns a prompt into a handle that workers take: checked, paired with a model, and prefilled unless nothing is new."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from adapter_router.access.quotas import Quotas
from adapter_router.admission import BYTES_PER_TOKEN
from adapter_router.catalog import NO_MODEL, paired_models
from adapter_router.demands import Demands
from adapter_router.dispatch import Call
from adapter_router.policy import Demand, EndpointSnapshot
from adapter_router.prefilling import Prefilling
from alora_serve.errors import DeadlinePassedError, ModelMismatchError, UnavailableError
from alora_serve.handles import HandleSigner, check_begun
from alora_serve.rpc.convert import Target, prefill_result_from_proto
from alora_serve.types import PrefillResult, PrefixHandle, Prompt, Usage
from alora_serve.v1 import types_pb2
from alora_serve.v1.base_prefill_pb2 import BasePrefillServicePrefillRequest

if TYPE_CHECKING:
    from adapter_router.peers import Workers

_HANDLE: Final = "prompt.handle"
_BEGUN: Final = "what has begun"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversation that workers can continue. ``prefill`` is what it cost; None when nothing had to be done."""

    handle: PrefixHandle
    prefill: PrefillResult | None


class Preparer:
    """Prepares prompts with whoever prefills."""

    def __init__(
        self,
        prefilling: Prefilling,
        workers: Workers,
        signer: HandleSigner,
        demands: Demands,
        quotas: Quotas,
    ) -> None:
        """Keep who does what.

        Args:
            prefilling: calls whoever prefills.
            workers: decode workers, with whose models a prefill is paired.
            signer: verifies handles before anyone works on them.
            demands: says what a prefill needs of an endpoint.
            quotas: says whether more may be stored for a tenant; charged with each prefill when it is done, since who
                asked may be gone before an answer ends, or begins; and with a guess when they go before that.
        """
        self._prefilling = prefilling
        self._workers = workers
        self._signer = signer
        self._demands = demands
        self._quotas = quotas

    async def prepare(
        self,
        prompt: Prompt,
        message: types_pb2.Prompt,
        *,
        call: Call,
        adapters: Collection[str] = ("",),
        tokenize_only: bool = False,
        begun_with: bytes = b"",
    ) -> Prepared:
        """The handle of a prompt about to be generated from. A closed handle alone passes as it is.

        Args:
            prompt: the checked prompt.
            message: the same as received; what base prefill gets.
            call: the public call.
            adapters: what will run on it; the models that serve the most of them will do. Empty names the base model.
            tokenize_only: nothing that will run on it can use base KV.
            begun_with: digest of the model that alone will do, as something that goes on began with it; empty for any.

        Raises:
            InvalidRequestError: a handle that does not verify, or what base prefill finds wrong.
            ModelMismatchError: a handle, or what has begun, of a model that no endpoint has; or of two.
            UnavailableError: nobody can prefill it.
        """
        handle = prompt.handle
        if handle is not None:
            self._signer.verify(handle, tenant_salt=call.tenant_salt)
            if begun_with:
                check_begun(begun_with, handle.model_digest)
        if handle is not None and not prompt.messages and not handle.open_turn:
            _check_model_left(handle.model_digest, _HANDLE, self._workers.snapshots())
            return Prepared(handle, None)
        result = await self._prefill(
            prompt, message, call, adapters, tokenize_only=tokenize_only, begun_with=begun_with
        )
        return Prepared(result.handle, result)

    async def prefill(self, prompt: Prompt, message: types_pb2.Prompt, *, call: Call) -> PrefillResult:
        """As :meth:`prepare`, but always at base prefill: for clients that warm a conversation."""
        if prompt.handle is not None:
            self._signer.verify(prompt.handle, tenant_salt=call.tenant_salt)
        return await self._prefill(prompt, message, call, tokenize_only=False)

    async def tokenize(self, prompt: Prompt, message: types_pb2.Prompt, *, call: Call) -> PrefixHandle:
        """As :meth:`prepare`, but always at base prefill, which runs and stores nothing."""
        if prompt.handle is not None:
            self._signer.verify(prompt.handle, tenant_salt=call.tenant_salt)
        return (await self._prefill(prompt, message, call, tokenize_only=True)).handle

    async def _prefill(
        self,
        prompt: Prompt,
        message: types_pb2.Prompt,
        call: Call,
        adapters: Collection[str] = ("",),
        *,
        tokenize_only: bool,
        begun_with: bytes = b"",
    ) -> PrefillResult:
        request = BasePrefillServicePrefillRequest(
            prompt=message,
            tokenize_only=tokenize_only,
            request_id=call.request_id,
            tenant=call.tenant,
            skip_store=not self._quotas.may_store(call.tenant),
        )
        demand = self._prefill_demand(prompt, adapters, call, begun_with)
        if tokenize_only:
            demand = replace(demand, expected_tokens=0)
        sent = asyncio.Event()
        try:
            result = prefill_result_from_proto(await self._prefilling.prefill(demand, request, call, sent.set))
        except (asyncio.CancelledError, DeadlinePassedError):
            if sent.is_set() and not tokenize_only:  # it may have been computed to its last token
                self._quotas.charge(call.tenant, Usage(computed_tokens=_guessed_tokens(message)))
            raise
        self._quotas.charge(call.tenant, result.usage)
        return result

    def _prefill_demand(self, prompt: Prompt, adapters: Collection[str], call: Call, begun_with: bytes) -> Demand:
        model = prompt.handle.model_digest if prompt.handle is not None else begun_with
        if model:
            what = _HANDLE if prompt.handle is not None else _BEGUN
            _check_model_left(model, what, self._prefilling.snapshots(), self._workers.snapshots())
            return self._demands.prefill(prompt, {model}, call.tenant_salt)
        models = paired_models(self._prefilling.snapshots(), self._workers.snapshots(), adapters)
        if not models:
            raise UnavailableError(NO_MODEL)
        return self._demands.prefill(prompt, models, call.tenant_salt)


def _guessed_tokens(message: types_pb2.Prompt) -> int:
    """As many as it was admitted with, but for those of its handle: to get that, they have been paid for."""
    return (message.ByteSize() - message.handle.ByteSize()) // BYTES_PER_TOKEN


def begun_model(targets: Iterable[Target]) -> bytes:
    """Digest of the model that interrupted targets of one prompt began with; empty where none of them says.

    Raises:
        ModelMismatchError: with different ones.
    """
    models = sorted({target.resume.model_digest for target in targets if target.resume} - {b""})
    for model in models:
        check_begun(models[0], model)
    return models[0] if models else b""


def _check_model_left(model_digest: bytes, what: str, *services: Sequence[EndpointSnapshot]) -> None:
    """Return if each service has an endpoint of the model that ``what`` is of, reachable or not.

    Raises:
        ModelMismatchError: one has none.
        UnavailableError: one has not reported any model yet.
    """
    for snapshots in services:
        models = {snapshot.model_digest for snapshot in snapshots if snapshot.model_digest}
        if not models:
            raise UnavailableError("no endpoint has reported its model yet; retry later")
        if model_digest not in models:
            raise ModelMismatchError(
                f"{what} is of model {model_digest.hex()[:12]}, which no endpoint serves; send the conversation again"
            )
