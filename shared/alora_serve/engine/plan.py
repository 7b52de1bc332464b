"""From a handle and an adapter to the tokens that a worker runs and where the adapter turns on."""

from __future__ import annotations

from dataclasses import dataclass

from alora_serve.adapters.activation import Activation, no_activation, place_invocation
from alora_serve.adapters.lora import LoadedAdapter
from alora_serve.errors import InvalidRequestError
from alora_serve.types import PrefixHandle, TokenIds


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """A handle turned into tokens and a boundary.

    Attributes:
        prompt: prefix and suffix.
        base_tokens: positions before it may be base KV from the store; 0 for plain LoRA.
    """

    prompt: TokenIds
    activation: Activation
    base_tokens: int


def plan_prompt(
    handle: PrefixHandle, adapter: LoadedAdapter | None, adapter_name: str, vocabulary_size: int
) -> PromptPlan:
    """Place the adapter's invocation.

    Raises:
        InvalidRequestError: the prompt is empty.
        InvocationUnplaceableError: the invocation has no place in it.
    """
    if adapter is None or not adapter.invocation_tokens:
        activation = no_activation(handle.generation_prompt_tokens)
    else:
        activation = place_invocation(
            kind=handle.kind,
            prefix_tokens=handle.prefix_tokens,
            generation_prompt_tokens=handle.generation_prompt_tokens,
            invocation_tokens=adapter.invocation_tokens,
            lead_tokens=adapter.lead_tokens,
            adapter_name=adapter_name,
            vocabulary_size=vocabulary_size,
        )
    prompt = handle.prefix_tokens + activation.suffix_tokens
    if not prompt:
        raise InvalidRequestError.of("handle", "the prompt is empty")
    base_tokens = len(prompt) if adapter is None else activation.invocation_start or 0
    return PromptPlan(prompt, activation, base_tokens)
