"""From settings to a running core: what both model services do when they start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from alora_serve.config import EngineSettings, ModelSettings, SecretSettings, ShareSettings, StoreSettings
from alora_serve.config.cache_directory import default_cache_directory
from alora_serve.cores import usable_cores
from alora_serve.engine.core import CoreOptions, ServingCore
from alora_serve.engine.public_prompts import read_public_prompts
from alora_serve.engine.rates import ALONE_SHARE
from alora_serve.engine.stepper import EngineLimits
from alora_serve.handles import HandleSigner
from alora_serve.kv.factory import open_store
from alora_serve.kv.record import HEADER_BYTES
from alora_serve.kv.redis_url import TlsFiles
from alora_serve.kv.store import KVStore
from alora_serve.kv.store_url import public_url
from alora_serve.kv.transfer import StoreTiming
from alora_serve.metrics import CoreMetrics
from alora_serve.model.device import device_name, open_device
from alora_serve.model.loader import BaseModel, load_base_model
from alora_serve.model.runner import measure_prefill
from alora_serve.model.source import model_name, resolve_model

_log = structlog.get_logger(__name__)


class CoreSettings(ModelSettings, StoreSettings, EngineSettings, ShareSettings, SecretSettings):
    """What a model service needs besides a place to listen."""


@dataclass(frozen=True, slots=True)
class StartedCore:
    """A core and what it stands on; :meth:`close` ends them in order."""

    core: ServingCore
    store: KVStore
    signer: HandleSigner

    def close(self) -> None:
        """Stop the engine, then the store."""
        self.core.close()
        self.store.close()


def start_core(settings: CoreSettings, metrics: CoreMetrics) -> StartedCore:
    """Load the model, open the store and start the engine. Takes seconds.

    Raises:
        ConfigError: a setting cannot be met; names it.
        ModelUnsupportedError: the model cannot be served.
    """
    signer = settings.signer()
    _bound_threads(settings.threads)
    model = open_model(settings)
    block_tokens = settings.block_tokens or model.layout.default_block_tokens()
    store = open_store(
        settings.store_url,
        budget_bytes=settings.store_budget_bytes,
        ttl_seconds=settings.store_ttl_seconds,
        breaker_failures=settings.breaker_failures,
        breaker_reset_seconds=settings.breaker_reset_seconds,
        metrics=metrics,
        tls=TlsFiles.of(settings),
        protection=settings.store_protection,
        secrets=[secret.get_secret_value().encode() for secret in settings.store_secrets],
        max_record_bytes=HEADER_BYTES + model.layout.largest_part_bytes(block_tokens),
    )
    options = CoreOptions(
        limits=EngineLimits(
            max_sequences=settings.max_batch_sequences,
            max_step_tokens=settings.max_step_tokens,
            max_mixed_step_tokens=settings.max_mixed_step_tokens,
            max_queue=settings.max_queue,
            tenant_share=settings.tenant_share,
        ),
        timing=StoreTiming(settings.store_timeout_seconds, settings.store_bytes_per_second),
        prefix_cache_bytes=settings.prefix_cache_bytes,
        always_fetch=settings.always_fetch,
        block_tokens=block_tokens,
        store_protection=settings.store_protection,
        tenant_salt=settings.tenant_salt.get_secret_value().encode(),
        public_prompts=read_public_prompts(settings.public_prompts_file, model.tokenizer),
    )
    core = ServingCore(model, store, options, metrics)
    # A worker that fetches everything runs no prompt of any length: it would never learn that computing is faster.
    speed = measure_prefill(model, max(1, round(settings.max_step_tokens * ALONE_SHARE)))
    core.engine.rates.prefill_tokens_per_second = speed
    _log.info(
        "core started",
        model=model.name,
        dtype=model.dtype,
        device=device_name(model.device),
        weight_layout=model.weight_layout,
        weight_quantization=model.weight_quantization,
        context_tokens=model.context_tokens,
        block_tokens=core.block_tokens,
        threads=torch.get_num_threads(),
        prefill_tokens_per_second=round(speed, 1),
        store=public_url(settings.store_url),
    )
    return StartedCore(core, store, signer)


def _bound_threads(threads: int) -> None:
    """Have torch compute on so many; for 0, on no more than a container's limit on processor time has the time of."""
    if threads:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def open_model(settings: ModelSettings) -> BaseModel:
    """Load the base model that settings name.

    Raises:
        ConfigError: the device or the model is not there.
        ModelUnsupportedError: the model cannot be served.
    """
    device = open_device(settings.device)
    model = load_base_model(
        resolve_model(settings.model),
        dtype=settings.dtype,
        device=device,
        context_tokens=settings.context_tokens,
        pack=settings.pack_weights,
        quantization=settings.weight_quantization,
        name=model_name(settings.model),
        digests=Path(settings.digest_cache_dir or default_cache_directory() / "digests"),
    )
    if model.tokenizer.prints_date:
        _log.warning(
            "the chat template prints the date; send date_string in template_arguments or reuse ends at midnight"
        )
    if not model.tokenizer.is_prefix_stable:
        _log.warning(
            "the chat template's generation prompt changes the turns before it: only what both renderings have in "
            "common is shared, and every request computes the rest as part of its generation prompt"
        )
    return model
