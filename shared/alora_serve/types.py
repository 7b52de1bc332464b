"""The domain objects that cross module borders: what a request asks for and what a stream answers.

Frozen, torch-free and gRPC-free. ``rpc/convert.py`` alone translates them from and to protobuf. Token ids are tuples of
ints here and packed little-endian uint32 on the wire.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NewType

AdapterDigest = NewType("AdapterDigest", str)
"""Lower-case hex SHA-256 of an adapter's config and weights: its identity. Names are for people."""

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by the assistant. ``arguments_json`` is a JSON object as text."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. ``role`` is one of ``system``, ``user``, ``assistant``, ``tool``."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A document the conversation is about; reaches the chat template as ``documents``."""

    title: str
    text: str
    doc_id: str = ""


class PromptKind(enum.Enum):
    """How a handle's tokens came to be, which decides where a worker may put an invocation."""

    CONVERSATION = "conversation"
    """Rendered from messages: closed turns, then a generation prompt apart."""
    TOKENS = "tokens"
    """Raw token ids, taken exactly as given; no generation prompt."""


@dataclass(frozen=True, slots=True)
class PrefixHandle:
    """A conversation as tokens, signed by the server. Holds no KV and names no blocks.

    Attributes:
        model_digest: 32 bytes: weights, forward config, tokenizer and chat template.
        storage_digest: 32 bytes: the rest of the key root (dtype, layout, block size, salt). A different one is a miss.
        prefix_tokens: everything before the generation prompt.
        generation_prompt_tokens: what the template puts before an assistant's answer; empty for ``TOKENS``.
        kind: see :class:`PromptKind`.
        last_role: role of the last turn in ``prefix_tokens``; empty for ``TOKENS``.
        open_turn: the tokens end inside an assistant's turn that the template has not closed yet (after a base turn).
        expires_unix_seconds: not accepted after this time plus the allowed clock skew.
        mac: 32 bytes HMAC-SHA256 over everything above and the tenant salt.
    """

    model_digest: bytes
    storage_digest: bytes
    prefix_tokens: TokenIds
    generation_prompt_tokens: TokenIds
    kind: PromptKind
    last_role: str
    open_turn: bool
    expires_unix_seconds: int
    mac: bytes = b""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue: messages, raw tokens, a handle, or a handle and the messages that are new since.

    Exactly one of: ``messages`` (with or without ``handle``), ``token_ids``, or ``handle`` alone.

    Attributes:
        template_arguments: extra variables for the chat template (``date_string``, ``enable_thinking``).
        tools: JSON-schema tool descriptions for the template.
    """

    messages: tuple[ChatMessage, ...] = ()
    token_ids: TokenIds = ()
    handle: PrefixHandle | None = None
    documents: tuple[Document, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Defaults are greedy.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        temperature: 0 is greedy; otherwise logits are divided by it, <= 100.
        top_p: nucleus mass in (0, 1].
        top_k: keep the k most likely; 0 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely, in [0, 1).
        repetition_penalty: as in transformers (prompt and output), > 0, 1 is off.
        presence_penalty: subtracted once from each token already generated, in [-2, 2].
        frequency_penalty: subtracted per occurrence in the generated tokens, in [-2, 2].
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        seed: keys the random numbers together with sample index and position; assigned before dispatch when None.
        sample_index: fan-out or sample index, the second key of the random numbers.
        stop: stop strings; the text ends before the first that occurs.
        stop_token_ids: further end-of-sequence ids.
        ignore_eos: go on past the model's own end of sequence.
        logprobs: report the log-probability of each chosen token.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """Where an interrupted stream stood: everything another worker needs to go on without a gap or a repeat.

    Attributes:
        generated_tokens: tokens already delivered, in order. Generated stays generated: never searched for invocations.
        invocation_start: position in the original prompt where the adapter turned on; None for base and plain LoRA.
        adapter_digest: the adapter that produced them; another one under the name is refused. Empty for base.
    """

    generated_tokens: TokenIds
    invocation_start: int | None
    adapter_digest: AdapterDigest


class FinishReason(enum.Enum):
    """Why a stream ended."""

    STOP = "stop"
    """End of sequence, a stop token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` reached."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Where each token of a request came from.

    Attributes:
        prompt_tokens: all tokens before the first generated one (invocation included).
        cached_tokens: prompt tokens whose KV was not computed for this request: resident in the process or fetched.
        fetched_tokens: those of them that came from the store.
        computed_tokens: prompt tokens run through the model for this request.
        generated_tokens: tokens in the answer.
        fetched_bytes: bytes of KV read from the store.
        stored_bytes: bytes of KV written to the store.
        invocation_start: first adapted position; None for base and plain LoRA.
        store_misses: blocks not had from the store, by reason (``absent``, ``corrupt``, ``version``, ``timeout``,
            ``unavailable``).
        store_drops: blocks not written, by reason (``full``, ``timeout``, ``unavailable``).
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    fetched_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    fetched_bytes: int = 0
    stored_bytes: int = 0
    invocation_start: int | None = None
    store_misses: Mapping[str, int] = field(default_factory=dict)
    store_drops: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds. ``first_token_seconds`` counts from the arrival at the reporting service."""

    queue_seconds: float = 0.0
    fetch_seconds: float = 0.0
    prefill_seconds: float = 0.0
    adapter_load_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """A conversation is stored: the handle to name it by, and what it cost."""

    handle: PrefixHandle
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: facts a resume needs."""

    adapter_digest: AdapterDigest
    invocation_start: int | None
    seed: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One or more new tokens.

    Attributes:
        token_ids: in order.
        text: what they add to the answer's text; may be empty while a character or a possible stop string is open.
        logprobs: one natural-log probability per token, at temperature 1 and before any truncation; empty unless asked.
    """

    token_ids: TokenIds
    text: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream.

    Attributes:
        text: text held back until now (see :class:`TokenChunk`).
        stop_string: the stop string that ended it, if one did.
        handle: for a base turn, names prompt and answer token for token; None with an adapter.
    """

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    text: str = ""
    stop_string: str = ""
    handle: PrefixHandle | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The engine loop is alive and this stream is in it, though no token is due yet."""


StreamEvent = Started | TokenChunk | Finished | Heartbeat
"""What a generation stream yields: one ``Started``, then chunks and heartbeats, then one ``Finished``."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation on a prepared prefix, as a decode worker takes it. ``adapter`` empty means the base model."""

    handle: PrefixHandle
    adapter: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    resume: Resume | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter as listed to people and routers.

    Attributes:
        kind: ``alora`` or ``lora``.
        target_modules: names of adapted module suffixes (``q_proj``), sorted.
        invocation_tokens: empty for plain LoRA.
        invocation_text: the same, decoded.
        resident: weights are in memory on the reporting worker.
        problem: why it cannot be served; empty when it can.
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


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model a release serves. Digests as in :class:`PrefixHandle`."""

    name: str
    model_digest: bytes
    storage_digest: bytes
    architecture: str
    dtype: str
    context_tokens: int
    vocabulary_size: int
    block_tokens: int
    kv_bytes_per_token: int


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
        adapters: every adapter this worker can serve; empty from base prefill.
        pending_prefill_tokens: prompt tokens of accepted requests that have not run yet.
        adapter_load_seconds: measured time to read an adapter's weights into memory.
        sequence_seconds: measured time of a sequence in the batch, from its place to its last token.
        resident_prefixes: base KV in memory.
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
