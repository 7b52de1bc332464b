"""The services' insides without sockets: prefiller, decoder and engine on any store, in the test's own process."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from alora_serve.adapters.loading import AdapterHost
from alora_serve.adapters.registry import AdapterRegistry
from alora_serve.engine.core import CoreOptions, ServingCore
from alora_serve.engine.decoder import Decoder
from alora_serve.engine.prefiller import Prefiller
from alora_serve.engine.scorer import Scorer
from alora_serve.handles import HandleSigner
from alora_serve.kv.store import KVStore, Put, Sink, StoreKey
from alora_serve.model.loader import BaseModel
from alora_serve.types import (
    Finished,
    GenerateRequest,
    Heartbeat,
    PrefillResult,
    PrefixHandle,
    Prompt,
    Resume,
    SamplingParams,
    Started,
    StreamEvent,
    TokenChunk,
)

SECRET = b"test secret of at least 16 bytes"


@dataclass
class MemoryStore:
    """A store in a dict: for tests whose subject is not the store."""

    values: dict[StoreKey, bytes] = field(default_factory=dict)

    def get_many(self, keys: Sequence[StoreKey], sink: Sink, *, timeout_seconds: float) -> None:
        for index, key in enumerate(keys):
            if key in self.values:
                sink(index, memoryview(self.values[key]))

    def contains_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> list[bool]:
        return [key in self.values for key in keys]

    def put_many(self, puts: Sequence[Put], *, timeout_seconds: float) -> None:
        self.values.update({put.key: bytes(put.value) for put in puts})

    def delete_many(self, keys: Sequence[StoreKey], *, timeout_seconds: float) -> None:
        for key in keys:
            self.values.pop(key, None)

    def close(self) -> None:
        pass


class CountingMetrics:
    """Every metric the engine reports, summed by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def store_miss(self, reason: str, blocks: int) -> None:
        self.counts[f"miss {reason}"] += blocks

    def store_drop(self, reason: str, blocks: int) -> None:
        self.counts[f"drop {reason}"] += blocks

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        self.counts["steps"] += 1
        self.counts["step tokens"] += tokens

    def load(self, running: int, waiting: int, tail_bytes: int) -> None:
        self.counts["peak running"] = max(self.counts["peak running"], running)
        self.counts["tail bytes"] = tail_bytes
        self.counts["peak tail bytes"] = max(self.counts["peak tail bytes"], tail_bytes)

    def queued_prefill_tokens(self, tokens: Callable[[], int]) -> None:
        self.queued_tokens = tokens

    def prefix_pinned_bytes(self, size_bytes: Callable[[], int]) -> None:
        self.pinned_bytes = size_bytes

    def prefix_lookup(self, hit_tokens: int, dropped_tokens: int, missed_tokens: int) -> None:
        self.counts["resident tokens"] += hit_tokens
        self.counts["dropped tokens"] += dropped_tokens
        self.counts["missed tokens"] += missed_tokens

    def fetch_decision(self, decision: str) -> None:
        self.counts[f"decided to {decision}"] += 1

    def measured_rates(self, fetch_bytes: Callable[[], float], prefill_tokens: Callable[[], float]) -> None:
        self.rates = fetch_bytes, prefill_tokens

    def prefix_evicted(self, segments: int) -> None:
        self.counts["evicted segments"] += segments

    def prefix_bytes(self, size_bytes: int) -> None:
        self.counts["prefix bytes"] = size_bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished stream."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    started: Started
    finished: Finished
    events: tuple[StreamEvent, ...]

    @property
    def chunks(self) -> list[TokenChunk]:
        return [event for event in self.events if isinstance(event, TokenChunk)]


@dataclass(frozen=True, slots=True)
class Stack:
    """One process's worth of services."""

    core: ServingCore
    prefiller: Prefiller
    decoder: Decoder
    scorer: Scorer
    adapters: AdapterRegistry
    metrics: CountingMetrics

    async def prefill(self, prompt: Prompt) -> PrefillResult:
        return await self.prefiller.prefill(prompt)

    async def generate(
        self, handle: PrefixHandle, adapter: str = "", *, resume: Resume | None = None, **sampling: object
    ) -> Answer:
        """Decode to the end. Greedy, 16 tokens, past any end of sequence, unless ``sampling`` says otherwise."""
        params = SamplingParams(**{"max_tokens": 16, "ignore_eos": True, "logprobs": True, **sampling})  # type: ignore[arg-type]
        events = [
            event
            async for event in self.decoder.decode(
                GenerateRequest(handle=handle, adapter=adapter, sampling=params, resume=resume)
            )
        ]
        chunks = [event for event in events if isinstance(event, TokenChunk)]
        # A busy machine may take a second before it starts: the first heartbeat is then ahead.
        started = next(event for event in events if not isinstance(event, Heartbeat))
        finished = events[-1]
        assert isinstance(started, Started)
        assert isinstance(finished, Finished)
        return Answer(
            tokens=tuple(token for chunk in chunks for token in chunk.token_ids),
            text="".join(chunk.text for chunk in chunks) + finished.text,
            logprobs=tuple(value for chunk in chunks for value in chunk.logprobs),
            started=started,
            finished=finished,
            events=tuple(events),
        )


@asynccontextmanager
async def open_stack(
    model: BaseModel, store: KVStore, *adapter_roots: Path, options: CoreOptions | None = None
) -> AsyncIterator[Stack]:
    """A stack with cold memory on a store; checks its books when closed."""
    metrics = CountingMetrics()
    # What a test expects to be reused must not depend on how fast this machine computes just now.
    core = ServingCore(model, store, replace(options or CoreOptions(), always_fetch=True), metrics)
    adapters = AdapterRegistry(adapter_roots, base=AdapterHost.of(model), max_resident_bytes=1 << 30)
    signer = HandleSigner([SECRET], b"", 3600)
    try:
        decoder, scorer = Decoder(core, adapters, signer), Scorer(core, adapters, signer)
        yield Stack(core, Prefiller(core, signer), decoder, scorer, adapters, metrics)
        await core.drain()
        core.cache.check_integrity()
    finally:
        core.close()
