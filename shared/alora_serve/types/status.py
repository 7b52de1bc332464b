"""What services say about themselves: their base model, adapters and load."""

from __future__ import annotations

from dataclasses import dataclass, field

from alora_serve.types.ids import AdapterDigest, TokenIds


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter as listed to people and routers.

    Attributes:
        kind: ``alora`` or ``lora``.
        target_modules: names of adapted module suffixes (``q_proj``), sorted.
        invocation_tokens: empty for plain LoRA.
        invocation_text: the same as text, special tokens spelt out.
        resident: weights are in memory on the reporting worker.
        problem: why it cannot be served; empty when it can.
        intrinsic_digest: lower-case hex SHA-256 of its ``io.yaml``; empty when it has none.
    """

    name: str
    digest: AdapterDigest
    kind: str
    rank: int
    target_modules: tuple[str, ...]
    invocation_tokens: TokenIds
    invocation_text: str
    size_bytes: int
    resident: bool
    problem: str = ""
    intrinsic_digest: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model a release serves. Digests as in :class:`PrefixHandle`.

    Attributes:
        context_tokens: longest prompt plus answer; as a router tells it, the shortest of all endpoints.
        takes_documents: the chat template has a place for documents.
    """

    name: str
    model_digest: bytes
    storage_digest: bytes
    architecture: str
    dtype: str
    context_tokens: int
    vocabulary_size: int
    block_tokens: int
    kv_bytes_per_token: int
    takes_documents: bool = False


@dataclass(frozen=True, slots=True)
class PrefixDigest:
    """Which prefixes' base KV a service holds in memory, in bounded space; see :mod:`alora_serve.kv.fingerprints`.

    Attributes:
        stride_tokens: tokens from one fingerprinted length to the next; 0 when nothing is told.
        fingerprints: of resident prefixes, each of 64 bits.
    """

    stride_tokens: int = 0
    fingerprints: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """What a service tells the router about itself, on every change and at least once a second.

    Measured figures are 0 while unknown, as all are from a service of an earlier version.

    Attributes:
        queued: requests waiting for a place in the batch.
        running: sequences in the batch.
        max_running: places in the batch.
        step_seconds: recent time of one decode step.
        kv_bytes: KV held in memory.
        fetch_bytes_per_second: measured.
        prefill_tokens_per_second: measured.
        adapters: every adapter of this worker, by name, refused ones too; empty from base prefill.
        pending_prefill_tokens: prompt tokens of accepted requests that have not run yet.
        adapter_load_seconds: measured time to read an adapter's weights into memory.
        sequence_seconds: measured time of a sequence in the batch, from its place to its last token.
        resident_prefixes: base KV in memory.
        longest_step_seconds: what its longest step should take: its streams may be silent for as long.
    """

    model: ModelInfo
    draining: bool = False
    queued: int = 0
    running: int = 0
    max_running: int = 0
    step_seconds: float = 0.0
    kv_bytes: int = 0
    fetch_bytes_per_second: float = 0.0
    prefill_tokens_per_second: float = 0.0
    adapters: tuple[AdapterInfo, ...] = ()
    pending_prefill_tokens: int = 0
    adapter_load_seconds: float = 0.0
    sequence_seconds: float = 0.0
    resident_prefixes: PrefixDigest = field(default_factory=PrefixDigest)
    longest_step_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ServingLoad:
    """How busy a model service is at one moment, for whoever else spreads requests over several.

    Attributes:
        running: sequences in the batch.
        waiting: sequences without a place in it.
        requests: all that were accepted and have not ended, those whose prefix or adapter is still coming included.
        max_running: places in the batch.
        queued_prefill_tokens: prompt tokens of sequences that have not run yet.
        kv_usage: KV that requests use, shared and their own, of what may stay resident: 0 to 1.
        running_adapters: adapters of the sequences in the batch, sorted.
        waiting_adapters: of those without a place.
    """

    running: int = 0
    waiting: int = 0
    requests: int = 0
    max_running: int = 1
    queued_prefill_tokens: int = 0
    kv_usage: float = 0.0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
