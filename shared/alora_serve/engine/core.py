"""The parts both model services stand on, put together in one place: store, resident KV, engine, loader, writer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from alora_serve.engine.block_writer import BlockWriter
from alora_serve.engine.engine import Engine
from alora_serve.engine.engine_metrics import EngineMetrics
from alora_serve.engine.fetch_decision import FetchDecision, FetchMetrics
from alora_serve.engine.places import Places
from alora_serve.engine.prefix_cache import PrefixCache, PrefixCacheMetrics
from alora_serve.engine.prefix_loader import LoadedPrefix, PrefixLoader
from alora_serve.engine.rates import ServiceRates
from alora_serve.engine.resident_prefixes import ResidentPrefixes
from alora_serve.engine.stepper import EngineLimits
from alora_serve.engine.turns import Turns
from alora_serve.kv.blocks import BlockStore
from alora_serve.kv.fingerprints import PrefixFingerprints
from alora_serve.kv.keys import BlockChain, RootFields, root_hash, storage_digest
from alora_serve.kv.naming import BlockNames
from alora_serve.kv.sealed import Protection
from alora_serve.kv.store import KVStore
from alora_serve.kv.tenancy import TenantSalts
from alora_serve.kv.transfer import BlockMetrics, StoreTiming
from alora_serve.model.host_copies import host_copies
from alora_serve.model.loader import BaseModel
from alora_serve.telemetry import counts, note, span
from alora_serve.types import EndpointStatus, ModelInfo, ServingLoad, TokenIds

STORE_THREADS = 4
"""Threads for blocking store calls that fetch, and as many for those that write: requests wait for what they fetch, and
a slow store has many writes waiting."""

GIVEN_UP_SECONDS = 60.0
"""How long an engine may hang, beyond what makes others leave it, before its process is of no use: a false alarm costs
all that the process holds."""


class CoreMetrics(BlockMetrics, EngineMetrics, FetchMetrics, PrefixCacheMetrics, Protocol):
    """What the parts report; implemented in ``metrics/``."""


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """Settings of the parts.

    Attributes:
        block_tokens: tokens a stored block; None for the layout's default.
        prefix_cache_bytes: budget of resident base KV.
        always_fetch: stored KV is fetched even where computing it has been faster.
        store_protection: what is done to stored values.
        tenant_salt: keeps deployments and tenants apart in a shared store.
        public_prompts: beginnings of conversations whose KV tenants share.
    """

    limits: EngineLimits = field(default_factory=EngineLimits)
    timing: StoreTiming = field(default_factory=StoreTiming)
    prefix_cache_bytes: int = 1 << 30
    always_fetch: bool = False
    block_tokens: int | None = None
    store_protection: Protection = "none"
    tenant_salt: bytes = b""
    public_prompts: tuple[TokenIds, ...] = ()


class ServingCore:
    """Everything between a base model and a store. Close it before the store.

    Attributes:
        storage_digest: what handles carry of the key root.
        turns: tenants' turns at what takes a processor before the engine: rendering and tokenizing.
        tokenizing: places of calls that want tokens and nothing of the engine; as many as it has.
        resident: which prefixes routers may count on.
        rates: told by those who run requests, for routers.
    """

    def __init__(self, model: BaseModel, store: KVStore, options: CoreOptions, metrics: CoreMetrics) -> None:
        self.model = model
        self.block_tokens = options.block_tokens or model.layout.default_block_tokens()
        root = RootFields(
            weights_digest=model.weights_digest,
            forward_config_digest=model.forward_config_digest,
            compute_dtype=model.dtype,
            weight_quantization=model.weight_quantization,
            weight_layout=model.weight_layout,
            device_type=model.device.type,
            kv_dtype=model.layout.dtype,
            kv_layout=model.layout.canonical(),
            block_tokens=self.block_tokens,
            store_protection=options.store_protection,
            deployment_salt=options.tenant_salt,
        )
        self.storage_digest = storage_digest(root)
        self.blocks = BlockStore(
            store,
            layout=model.layout,
            block_tokens=self.block_tokens,
            timing=options.timing,
            metrics=metrics,
        )
        self.names = BlockNames(root_hash(root), self.block_tokens, options.public_prompts)
        self.tenants = TenantSalts(options.tenant_salt)
        self.cache = PrefixCache(
            model.layout, budget_bytes=options.prefix_cache_bytes, device=model.device, metrics=metrics
        )
        self.engine = Engine(model, self.cache, limits=options.limits, metrics=metrics)
        self._limits = options.limits
        self.turns = Turns()
        self.tokenizing = Places(options.limits.max_sequences, options.limits.max_queue, options.limits.tenant_share)
        self._fetchers = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store-fetch")
        self._writers = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store-write")
        self.rates = ServiceRates()
        self._fetching = FetchDecision(
            model.layout.bytes_per_token,
            self.rates.fetch_bytes,
            lambda: self.engine.rates.prefill_tokens_per_second,
            metrics,
            always=options.always_fetch,
        )
        self.loader = PrefixLoader(
            self.cache, self.blocks, self._fetchers, host_copies(model.device), self._fetching.should_fetch
        )
        self.writer = BlockWriter(self.cache, self.blocks, self._writers)
        fingerprints = PrefixFingerprints(options.tenant_salt)
        self.resident = ResidentPrefixes(self.cache.resident, fingerprints, model.model_digest)

    async def load_prefix(self, chain: BlockChain, limit: int) -> LoadedPrefix:
        """As :meth:`PrefixLoader.load`, and remembered for routers: how fast it came and that it is here."""
        with span("load prefix"):
            loaded = await self.loader.load(chain, limit)
            note(
                lambda: {
                    "alora.tokens.wanted": limit,
                    "alora.tokens.loaded": loaded.prefix.tokens,
                    "alora.tokens.fetched": loaded.fetched_tokens,
                    **counts("alora.misses", loaded.misses),
                }
            )
        self._fetching.measured(loaded.fetched_bytes, loaded.own_seconds)
        self.resident.note(chain)
        return loaded

    def model_info(self) -> ModelInfo:
        """The base model, as told to routers and people."""
        model = self.model
        return ModelInfo(
            name=model.name,
            model_digest=model.model_digest,
            storage_digest=self.storage_digest,
            architecture=type(model.module).__name__,
            dtype=model.dtype,
            context_tokens=model.context_tokens,
            vocabulary_size=model.vocabulary_size,
            block_tokens=self.block_tokens,
            kv_bytes_per_token=model.layout.bytes_per_token,
            takes_documents=model.tokenizer.takes_documents,
        )

    def status(self, *, draining: bool = False) -> EndpointStatus:
        """How busy this process is."""
        load = self.engine.load
        return EndpointStatus(
            model=self.model_info(),
            draining=draining,
            queued=load.waiting,
            running=load.running,
            max_running=self._limits.max_sequences,
            step_seconds=load.rates.step_seconds,
            kv_bytes=self.cache.size_bytes,
            fetch_bytes_per_second=self.rates.fetch_bytes.per_second,
            prefill_tokens_per_second=load.rates.prefill_tokens_per_second,
            pending_prefill_tokens=load.pending_prefill_tokens,
            sequence_seconds=self.rates.sequence_seconds.value,
            resident_prefixes=self.resident.digest(),
            longest_step_seconds=self.engine.pulse.longest_step_seconds,
        )

    def is_alive(self) -> bool:
        """Its engine does not hang: see :class:`~alora_serve.engine.pulse.Pulse`."""
        return not self.engine.pulse.is_lost

    def may_recover(self) -> bool:
        """Its engine does not hang, or not for so long that nothing but a new process helps."""
        return self.engine.pulse.lost_seconds <= GIVEN_UP_SECONDS

    def serving_load(self) -> ServingLoad:
        """The same for those who know nothing of our status stream; cheap, and from any thread."""
        load = self.engine.load
        used_bytes = self.cache.pinned_bytes + load.tail_bytes
        return ServingLoad(
            running=load.running,
            waiting=load.waiting,
            requests=load.requests,
            max_running=self._limits.max_sequences,
            queued_prefill_tokens=load.pending_prefill_tokens,
            kv_usage=min(used_bytes / self.cache.budget_bytes, 1.0) if self.cache.budget_bytes else 1.0,
            running_adapters=load.running_adapters,
            waiting_adapters=load.waiting_adapters,
        )

    async def drain(self) -> None:
        """Wait until what was computed for others is stored."""
        await self.writer.drain()

    def close(self) -> None:
        """Stop the engine and the store's threads. Idempotent."""
        self.engine.close()
        for executor in (self._fetchers, self._writers):
            executor.shutdown(wait=True, cancel_futures=True)
        self.cache.close()
