"""How to answer: which adapter, how to choose tokens, and where an interrupted answer stood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from alora_serve.types.ids import AdapterDigest, TokenIds
from alora_serve.types.prompt import PrefixHandle
from alora_serve.types.structure import StructuredOutput


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Defaults are greedy.

    Attributes:
        max_tokens: most tokens to generate, >= 1; prompt and these must fit the context. None is
            ``default_max_tokens``, or what the context leaves where that is less.
        temperature: 0 is greedy; otherwise logits are divided by it, <= 100.
        top_p: nucleus mass in (0, 1].
        top_k: keep the k most likely; 0 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely, in [0, 1).
        repetition_penalty: as in transformers (prompt and output), in [0.01, 100], 1 is off.
        presence_penalty: subtracted once from each token already generated, in [-2, 2].
        frequency_penalty: subtracted per occurrence in the generated tokens, in [-2, 2].
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        seed: keys the random numbers together with sample index and position; assigned before dispatch when None.
        sample_index: fan-out or sample index, the second key of the random numbers.
        stop: stop strings; the text ends before the first that occurs.
        stop_token_ids: further end-of-sequence ids, part of the text but where they end a ``structured_output``.
        ignore_eos: go on past the model's own end of sequence.
        logprobs: report the log-probability of each chosen token.
        top_logprobs: report this many most likely tokens at each position, to 20; implies ``logprobs``.
        n: samples from one prefix, 1 to 64; the router makes as many requests of it, each with its ``sample_index``.
        structured_output: the form that the answer must have; None leaves it free.
        default_max_tokens: most tokens to generate where ``max_tokens`` is None, >= 1.
    """

    max_tokens: int | None = None
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
    top_logprobs: int = 0
    n: int = 1
    structured_output: StructuredOutput | None = None
    default_max_tokens: int = 256

    @property
    def most_tokens(self) -> int:
        """Where the answer ends at the latest, if the context has room for so much."""
        return self.default_max_tokens if self.max_tokens is None else self.max_tokens


@dataclass(frozen=True, slots=True)
class Resume:
    """Where an interrupted stream stood: everything another worker needs to go on without a gap or a repeat.

    Attributes:
        generated_tokens: tokens already delivered, in order. Generated stays generated: never searched for invocations.
        invocation_start: position in the original prompt where the adapter turned on; None for base and plain LoRA.
        adapter_digest: the adapter that produced them; another one under the name is refused. Empty for base.
        model_digest: of the model that produced them; no other goes on with them. Empty where that was not said.
    """

    generated_tokens: TokenIds
    invocation_start: int | None
    adapter_digest: AdapterDigest
    model_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation on a prepared prefix, as a decode worker takes it.

    Attributes:
        adapter: its name; empty is the base model.
        tenant: for whom, as the router authenticated it; empty without tenants.
        skip_store: nothing new is written to the store.
        is_taken_over: the router goes on with what a worker, lost since, had taken in; never a client's word.
    """

    handle: PrefixHandle
    adapter: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    resume: Resume | None = None
    request_id: str = ""
    tenant: str = ""
    skip_store: bool = False
    is_taken_over: bool = False


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Texts to score after a prepared prefix, as a decode worker takes them.

    Attributes:
        adapter: its name; empty is the base model.
        continuations: each scored after the same prompt; at least one.
        tenant: as in :class:`GenerateRequest`.
        skip_store: likewise.
    """

    handle: PrefixHandle
    adapter: str
    continuations: tuple[str, ...]
    request_id: str = ""
    tenant: str = ""
    skip_store: bool = False
