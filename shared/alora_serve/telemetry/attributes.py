"""What spans say of requests, by the names of OpenTelemetry's GenAI conventions where these have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from alora_serve.types import GenerateRequest, PromptKind, Started, Usage

Attributes: TypeAlias = Mapping[str, str | bool | int | float | Sequence[str]]


def request_attributes(request: GenerateRequest, model_name: str) -> Attributes:
    """What is asked.

    Args:
        request: of it, nothing that was said.
        model_name: of the base model; an adapter's own name stands before it.
    """
    is_chat = request.handle.kind is PromptKind.CONVERSATION
    attributes: dict[str, str | int] = {
        "gen_ai.operation.name": "chat" if is_chat else "text_completion",
        "gen_ai.provider.name": "alora_serve",
        "gen_ai.request.model": request.adapter or model_name,
        "gen_ai.request.max_tokens": request.sampling.most_tokens,
        "alora.base_model": model_name,
    }
    if request.adapter:
        attributes["alora.adapter"] = request.adapter
    return attributes


def started_attributes(started: Started, resumed_tokens: int) -> Attributes:
    """With which version of the adapter it runs, and from where; how many tokens another worker had said before."""
    attributes: dict[str, str | int] = {"alora.tokens.resumed": resumed_tokens}
    if started.adapter_digest:
        attributes["alora.adapter.digest"] = started.adapter_digest
    if started.invocation_start is not None:
        attributes["alora.invocation_start"] = started.invocation_start
    return attributes


def usage_attributes(usage: Usage) -> Attributes:
    """Where tokens and bytes came from and went."""
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "alora.tokens.fetched": usage.fetched_tokens,
        "alora.tokens.computed": usage.computed_tokens,
        "alora.bytes.fetched": usage.fetched_bytes,
        "alora.bytes.stored": usage.stored_bytes,
        **counts("alora.misses", usage.store_misses),
        **counts("alora.drops", usage.store_drops),
    }


def answer_attributes(usage: Usage, finish_reason: str) -> Attributes:
    """:func:`usage_attributes` of a whole answer, and why it ended."""
    return {**usage_attributes(usage), "gen_ai.response.finish_reasons": (finish_reason,)}


def counts(prefix: str, by_reason: Mapping[str, int]) -> Attributes:
    """One attribute a reason."""
    return {f"{prefix}.{reason}": number for reason, number in by_reason.items()}
