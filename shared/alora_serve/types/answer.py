"""What a stream answers, where its tokens came from and where its time went."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from alora_serve.types.ids import AdapterDigest, TokenIds
from alora_serve.types.prompt import PrefixHandle


class FinishReason(enum.Enum):
    """Why a stream ended."""

    STOP = "stop"
    """End of sequence, a stop token or a stop string; or the form of the answer leaves nothing to add."""
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
            ``unavailable``), or ``slower``: not asked for, as computing them has been faster.
        store_drops: blocks not written, by reason (``full``, ``timeout``, ``unavailable``, ``backlog``, ``quota``).
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
class TokenizedPrompt:
    """A prompt as the model gets it.

    Attributes:
        prefix_tokens: before the generation prompt: what is prefilled, and shared.
        generation_prompt_tokens: after which the base model answers; empty for a prompt of token ids.
    """

    prefix_tokens: TokenIds
    generation_prompt_tokens: TokenIds


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How likely a text is after a prompt.

    Attributes:
        token_ids: its tokens.
        logprobs: natural-log probability of each, given the prompt and the tokens before it; at temperature 1.
    """

    token_ids: TokenIds
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Natural-log probability of the whole text, as these tokens."""
        return sum(self.logprobs)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Continuations of one prompt, in the order asked, and what they cost: ``usage`` is the prompt's."""

    scores: tuple[ContinuationScore, ...]
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: facts a resume needs. ``model_digest`` is empty from a server of an earlier version."""

    adapter_digest: AdapterDigest
    invocation_start: int | None
    seed: int
    prompt_tokens: int
    model_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that the model could have chosen.

    Attributes:
        logprob: natural log of its probability, at temperature 1 and before bias, penalties, truncation and form.
        token_bytes: what it would add to the text, a character's part if need be; of a special token, its name.
    """

    token_id: int
    logprob: float
    token_bytes: bytes

    @property
    def text(self) -> str:
        """Its bytes as text, those of no whole character as U+FFFD."""
        return self.token_bytes.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One or more new tokens.

    Attributes:
        token_ids: in order.
        text: what they add to the answer's text; may be empty while a character or a possible stop string is open.
        logprobs: one a token, as in :class:`TokenLogprob`; empty unless asked for.
        token_bytes: of each token, as in :class:`TokenLogprob`; empty unless log-probabilities are asked for.
        top_logprobs: for each token, the most likely ones in its place, likeliest first; empty unless asked for.
    """

    token_ids: TokenIds
    text: str
    logprobs: tuple[float, ...] = ()
    token_bytes: tuple[bytes, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()


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
