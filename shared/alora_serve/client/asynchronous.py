"""The client for asyncio: the same calls as :class:`alora_serve.client.Client`, awaited."""

from __future__ import annotations

import copy
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # the package has no stubs

from alora_serve.client.arguments import (
    GenerateFields,
    Messages,
    PromptFields,
    fan_out_request,
    generate_request,
    intrinsic_run,
    prefill_request,
    sample_request,
    score_request,
    tokenize_request,
)
from alora_serve.client.async_streams import AsyncFanOutStream, AsyncGenerationStream, AsyncSampleStream
from alora_serve.client.failures import failure_of
from alora_serve.client.intrinsics import AsyncIntrinsicsStream
from alora_serve.client.retry import Retries, RetryPolicy
from alora_serve.errors import DeadlinePassedError, UnavailableError
from alora_serve.rpc.channels import public_options
from alora_serve.rpc.convert import (
    Target,
    adapter_from_proto,
    intrinsic_result_from_proto,
    load_adapter_to_proto,
    model_from_proto,
    prefill_result_from_proto,
    run_intrinsic_to_proto,
    run_intrinsics_to_proto,
    score_result_from_proto,
    tokenized_from_proto,
    unload_adapter_to_proto,
)
from alora_serve.rpc.status import REQUEST_ID_KEY
from alora_serve.rpc.tracing import (
    trace_metadata,
)
from alora_serve.types import (
    AdapterInfo,
    IntrinsicResult,
    ModelInfo,
    PrefillResult,
    ScoreResult,
    TokenizedPrompt,
)
from alora_serve.v1 import alora_pb2
from alora_serve.v1.alora_pb2_grpc import AloraServiceStub

ResponseT = TypeVar("ResponseT")


class AsyncClient:
    """A connection to a router for one event loop. Use it as an async context manager or close it.

    In use::

        async with AsyncClient("127.0.0.1:50051") as client:
            answer = await client.generate("Why is the sky blue?", max_tokens=64).result()
            async for event in client.generate(handle=answer.handle, adapter="jailbreak"):
                ...

    Errors and ``timeout_seconds`` are those of :class:`alora_serve.client.Client`.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
        retry: RetryPolicy | None = None,
        api_key: str | None = None,
    ) -> None:
        """Prepare; the first call connects.

        Args:
            address: ``host:port`` of a router, or ``dns:///name:port``; where a name has several, they share the calls.
                One on this machine is reached directly, whatever proxy is set.
            credentials: for TLS; None is plain text.
            server_name: the name in the router's certificate, where it is not that of ``address``.
            retry: see :class:`RetryPolicy`.
            api_key: shown with every call, where the router asks for one. Without TLS, the network reads it.
        """
        options = public_options(address, server_name=server_name)
        self._address = address
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._stub = AloraServiceStub(self._channel)
        self._retry = retry or RetryPolicy()
        self._closed = threading.Event()
        self._metadata = _metadata(api_key)

    def on_behalf_of(self, *, api_key: str | None = None, request_id: str | None = None) -> Self:
        """This client as another caller: on the same connection, so neither outlives the other's :meth:`close`.

        Args:
            api_key: that caller's, shown instead of this client's own; None shows none.
            request_id: names its calls in every service's log; None leaves that to the router.
        """
        other = copy.copy(self)
        other._metadata = _metadata(api_key, request_id)
        return other

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._closed.set()
        await self._channel.close()

    def generate(
        self,
        messages: Messages | None = None,
        *,
        adapter: str | None = None,
        timeout_seconds: float | None = None,
        **fields: Unpack[GenerateFields],
    ) -> AsyncGenerationStream:
        """Continue a conversation; the stream has begun when this returns, and iterating or ``result()`` reads it.

        Args:
            messages: the conversation, or with ``handle`` only its new turns.
            adapter: who answers; None or empty is the base model.
            timeout_seconds: of the whole call.
            **fields: the rest of the prompt and the sampling parameters.
        """
        request = generate_request(messages, adapter, fields)
        return AsyncGenerationStream(
            lambda wanted, timeout: self._stub.Generate(wanted, timeout=timeout, metadata=self._call_metadata()),
            request,
            Retries(self._retry, timeout_seconds, self._closed),
        )

    def sample(
        self,
        messages: Messages | None = None,
        count: int = 1,
        *,
        adapter: str | None = None,
        timeout_seconds: float | None = None,
        **fields: Unpack[GenerateFields],
    ) -> AsyncSampleStream:
        """Continue a conversation 1 to 64 times in one call, each time with other random numbers of one seed.

        Args:
            messages: as in :meth:`generate`.
            count: how many samples.
            adapter: as in :meth:`generate`.
            timeout_seconds: of the whole call.
            **fields: as in :meth:`generate`; without a ``temperature`` all samples are the same.
        """
        request = sample_request(messages, count, adapter, fields)
        return AsyncSampleStream(
            lambda wanted, timeout: self._stub.Generate(wanted, timeout=timeout, metadata=self._call_metadata()),
            request,
            Retries(self._retry, timeout_seconds, self._closed),
        )

    def fanout(
        self,
        messages: Messages | None,
        adapters: Sequence[str | Target | None],
        *,
        timeout_seconds: float | None = None,
        **fields: Unpack[GenerateFields],
    ) -> AsyncFanOutStream:
        """Ask 1 to 256 adapters about one conversation in one call; the conversation is prefilled once.

        Args:
            messages: as in :meth:`generate`; None when ``fields`` has a handle.
            adapters: names, None for the base model, or a :class:`Target` with sampling parameters of its own.
            timeout_seconds: of the whole call.
            **fields: as in :meth:`generate`, for all targets that bring none of their own.
        """
        request = fan_out_request(messages, adapters, fields)
        return AsyncFanOutStream(
            lambda wanted, timeout: self._stub.FanOut(wanted, timeout=timeout, metadata=self._call_metadata()),
            request,
            Retries(self._retry, timeout_seconds, self._closed),
        )

    async def run_intrinsic(
        self,
        messages: Messages | None,
        intrinsic: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        timeout_seconds: float | None = None,
        **fields: Unpack[PromptFields],
    ) -> IntrinsicResult:
        """Ask one intrinsic about a conversation; its typed result.

        Args:
            messages: as in :meth:`generate`; None when ``fields`` has a handle.
            intrinsic: name of its adapter, which has an ``io.yaml``.
            parameters: what its instruction names: texts, numbers or booleans.
            timeout_seconds: of the whole call.
            **fields: the rest of the prompt.
        """
        request = run_intrinsic_to_proto(intrinsic_run(messages, [intrinsic], parameters, fields))
        return intrinsic_result_from_proto(await self._call(self._stub.RunIntrinsic, request, timeout_seconds))

    def run_intrinsics(
        self,
        messages: Messages | None,
        intrinsics: Sequence[str],
        *,
        parameters: Mapping[str, Any] | None = None,
        timeout_seconds: float | None = None,
        **fields: Unpack[PromptFields],
    ) -> AsyncIntrinsicsStream:
        """Ask 1 to 256 intrinsics about one conversation in one call; the conversation is prefilled once.

        Args:
            messages: as in :meth:`generate`; None when ``fields`` has a handle.
            intrinsics: names of their adapters.
            parameters: what their instructions name; each takes its own.
            timeout_seconds: of the whole call.
            **fields: the rest of the prompt.
        """
        request = run_intrinsics_to_proto(intrinsic_run(messages, intrinsics, parameters, fields))
        return AsyncIntrinsicsStream(
            lambda wanted, timeout: self._stub.RunIntrinsics(wanted, timeout=timeout, metadata=self._call_metadata()),
            request,
            Retries(self._retry, timeout_seconds, self._closed),
        )

    async def prefill(
        self,
        messages: Messages | None = None,
        *,
        timeout_seconds: float | None = None,
        **fields: Unpack[PromptFields],
    ) -> PrefillResult:
        """Compute and store a conversation's KV; pass the handle of the result to later calls."""
        request = prefill_request(messages, fields)
        return prefill_result_from_proto(await self._call(self._stub.Prefill, request, timeout_seconds))

    async def tokenize(
        self,
        messages: Messages | None = None,
        *,
        timeout_seconds: float | None = None,
        **fields: Unpack[PromptFields],
    ) -> TokenizedPrompt:
        """Render and tokenize a conversation as :meth:`generate` would; nothing is run or stored."""
        request = tokenize_request(messages, fields)
        return tokenized_from_proto(await self._call(self._stub.Tokenize, request, timeout_seconds))

    async def score(
        self,
        messages: Messages | None,
        continuations: Sequence[str],
        *,
        adapter: str | None = None,
        timeout_seconds: float | None = None,
        **fields: Unpack[PromptFields],
    ) -> ScoreResult:
        """How likely each text is after the conversation, token by token; the conversation is computed once.

        Args:
            messages: as in :meth:`generate`; None when ``fields`` has a handle or tokens.
            continuations: 1 to 256 texts.
            adapter: by whom; None or empty is the base model.
            timeout_seconds: of the whole call.
            **fields: the rest of the prompt.
        """
        request = score_request(messages, continuations, adapter, fields)
        return score_result_from_proto(await self._call(self._stub.Score, request, timeout_seconds))

    async def list_adapters(self, *, timeout_seconds: float | None = None) -> list[AdapterInfo]:
        """Every adapter by name; one with a ``problem`` cannot be served."""
        response = await self._call(self._stub.ListAdapters, alora_pb2.ListAdaptersRequest(), timeout_seconds)
        return [adapter_from_proto(adapter) for adapter in response.adapters]

    async def load_adapter(self, name: str, *, timeout_seconds: float | None = None) -> AdapterInfo:
        """Read an adapter's weights into the memory of the worker that will serve it."""
        response = await self._call(self._stub.LoadAdapter, load_adapter_to_proto(name), timeout_seconds)
        return adapter_from_proto(response.adapter)

    async def unload_adapter(self, name: str, *, timeout_seconds: float | None = None) -> bool:
        """Drop an adapter's weights from every worker's memory once running requests are done; whether one had them."""
        request = unload_adapter_to_proto(name)
        return (await self._call(self._stub.UnloadAdapter, request, timeout_seconds)).was_resident

    async def get_model(self, *, timeout_seconds: float | None = None) -> ModelInfo:
        """The base model."""
        response = await self._call(self._stub.GetModel, alora_pb2.GetModelRequest(), timeout_seconds)
        return model_from_proto(response.model)

    async def wait_ready(self, timeout_seconds: float = 60.0) -> None:
        """Return once the router serves: it is up, and a base prefill and a worker of one model are too.

        Raises:
            UnavailableError: it did not in time.
        """
        health: Any = health_pb2_grpc.HealthStub(self._channel)
        retries = Retries(RetryPolicy(begin_seconds=timeout_seconds), timeout_seconds, self._closed)
        try:
            while True:
                watch = health.Watch(
                    health_pb2.HealthCheckRequest(), timeout=retries.remaining_seconds(), wait_for_ready=True
                )
                try:
                    async for response in watch:
                        if response.status == health_pb2.HealthCheckResponse.SERVING:
                            return
                except grpc.aio.AioRpcError as error:
                    await retries.async_wait_after(failure_of(error))
                finally:
                    watch.cancel()
        except (DeadlinePassedError, UnavailableError) as error:
            raise UnavailableError(f"{self._address} is not ready after {timeout_seconds:g} s: {error}") from error

    def _call_metadata(self) -> tuple[tuple[str, str], ...]:
        """What is said of the caller, and the trace that it is in."""
        return (*self._metadata, *trace_metadata())

    async def _call(
        self, method: Callable[..., Awaitable[ResponseT]], request: object, timeout_seconds: float | None
    ) -> ResponseT:
        retries = Retries(self._retry, timeout_seconds, self._closed)
        while True:
            try:
                return await method(request, timeout=retries.remaining_seconds(), metadata=self._call_metadata())
            except grpc.aio.AioRpcError as error:
                await retries.async_wait_after(failure_of(error))


def _metadata(api_key: str | None, request_id: str | None = None) -> tuple[tuple[str, str], ...]:
    key = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
    return key if request_id is None else (*key, (REQUEST_ID_KEY, request_id))
