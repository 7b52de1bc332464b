"""This project over gRPC: client, router, worker and store, each a process of its own."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from adapters import Adapter
from systems.base import Answer, FanOutAnswers, Warmed

from alora_serve.cli.local.deployment import DeploymentOptions, LocalDeployment
from alora_serve.client import AsyncClient
from alora_serve.types import Finished, PrefixHandle, TokenChunk, TokenIds

_NO_ANSWER = "the stream ended without its last message"


class Served:
    """aLoRA over gRPC. Start the deployment with :class:`Deployed` and share it with :class:`ServedTwins`."""

    plain = False

    def __init__(self, deployed: Deployed, name: str = "ours, aLoRA over gRPC, KV in the store") -> None:
        self.name = name
        self._deployed = deployed
        self._handles: dict[TokenIds, PrefixHandle] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Base prefill computes and stores; the decode worker sees nothing yet."""
        began = perf_counter()
        result = await self._deployed.client.prefill(token_ids=prefix)
        self._handles[prefix] = result.handle
        return Warmed(result.usage.computed_tokens, perf_counter() - began)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        """One ``Generate``; the conversation goes along as a handle where it was warmed."""
        name = adapter.name if adapter else None
        handle = self._handles.get(prefix)
        prompt: dict[str, Any] = {"handle": handle} if handle else {"token_ids": prefix}
        return await _generate(self._deployed.client, name, prompt, max_tokens)

    async def fan_out(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> FanOutAnswers:
        """One ``FanOut``."""
        began = perf_counter()
        stream = self._deployed.client.fanout(
            None,
            [adapter.name for adapter in adapters],
            handle=self._handles[prefix],
            max_tokens=max_tokens,
            ignore_eos=True,
        )
        first = [0.0] * len(adapters)
        last = [0.0] * len(adapters)
        notes: list[dict[str, float]] = [{} for _ in adapters]
        tokens: list[list[int]] = [[] for _ in adapters]
        async for index, event in stream:
            match event:
                case TokenChunk():
                    first[index] = first[index] or perf_counter() - began
                    tokens[index] += event.token_ids
                case Finished():
                    last[index] = perf_counter() - began
                    notes[index] = _notes(event)
                case Exception():
                    raise event
        total = perf_counter() - began
        answers = [Answer(tuple(tokens[i]), first[i], last[i], notes[i]) for i in range(len(adapters))]
        return FanOutAnswers(tuple(answers), total)


class ServedTwins(Served):
    """The same services asked with the plain LoRA twins, which have nothing to reuse: the stricter baseline."""

    plain = True

    def __init__(self, deployed: Deployed, name: str = "ours, plain LoRA over gRPC, recomputed") -> None:
        super().__init__(deployed, name)

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Nothing: base KV is of no use to a plain LoRA."""
        return Warmed(0, 0.0)

    async def ask(self, prefix: TokenIds, adapter: Adapter | None, max_tokens: int) -> Answer:
        """One ``Generate`` of the whole prompt."""
        if adapter is None:
            return await super().ask(prefix, None, max_tokens)
        prompt = {"token_ids": prefix + adapter.invocation}
        return await _generate(self._deployed.client, adapter.twin, prompt, max_tokens)

    async def fan_out(self, prefix: TokenIds, adapters: Sequence[Adapter], max_tokens: int) -> FanOutAnswers:
        """As many ``Generate`` at once, since each prompt ends otherwise; the worker batches them."""
        began = perf_counter()
        answers = await asyncio.gather(*(self.ask(prefix, adapter, max_tokens) for adapter in adapters))
        return FanOutAnswers(tuple(answers), perf_counter() - began)


class ServedResident(Served):
    """The same once more, the conversation already in the worker's memory."""

    def __init__(self, deployed: Deployed, name: str = "ours, aLoRA over gRPC, prefix in the worker") -> None:
        super().__init__(deployed, name)

    async def warm(self, prefix: TokenIds) -> Warmed:
        """Prefill, and one question that brings the prefix to the worker."""
        warmed = await super().warm(prefix)
        await self.ask(prefix, self._deployed.adapters[0], 1)
        return warmed


@contextmanager
def empty_store() -> Iterator[str]:
    """The URL of an LMDB of this run alone: what an earlier run left would be found, and not be computed."""
    shared_memory = Path("/dev/shm")
    place = shared_memory if shared_memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="alora-serve-bench-", dir=place) as directory:
        yield f"lmdb://{directory}"


class Deployed:
    """The services while the block runs, on an empty store, with every adapter in the worker's memory."""

    def __init__(self, options: DeploymentOptions, adapters: Sequence[Adapter]) -> None:
        """Without a store in ``options``, it is :func:`empty_store`."""
        self._options = options
        self._stack = AsyncExitStack()
        self.adapters = adapters

    @property
    def client(self) -> AsyncClient:
        """Connected to the router."""
        return self._client

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            url = self._options.store_url or stack.enter_context(empty_store())
            self.deployment = await stack.enter_async_context(LocalDeployment(replace(self._options, store_url=url)))
            self._client = await stack.enter_async_context(AsyncClient(self.deployment.router_address))
            await self.load_adapters()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def restart_workers(self) -> None:
        """Replace every decode worker by a fresh process, which holds neither adapters nor KV."""
        await self.deployment.restart(*self.deployment.worker_names)

    async def load_adapters(self) -> None:
        """Read every aLoRA into memory, as it is after its first question. Twins load with theirs."""
        for adapter in self.adapters:
            await self._client.load_adapter(adapter.name)


async def _generate(client: AsyncClient, adapter: str | None, prompt: dict[str, Any], max_tokens: int) -> Answer:
    began = perf_counter()
    first = 0.0
    tokens: list[int] = []
    finished: Finished | None = None
    async for event in client.generate(adapter=adapter, max_tokens=max_tokens, ignore_eos=True, **prompt):
        if isinstance(event, TokenChunk):
            first = first or perf_counter() - began
            tokens += event.token_ids
        elif isinstance(event, Finished):
            finished = event
    if finished is None:
        raise RuntimeError(_NO_ANSWER)
    return Answer(tuple(tokens), first, perf_counter() - began, _notes(finished))


def _notes(finished: Finished) -> dict[str, float]:
    usage = finished.usage
    return {
        "fetched_bytes": usage.fetched_bytes,
        "cached_tokens": usage.cached_tokens,
        "computed_tokens": usage.computed_tokens,
    }
