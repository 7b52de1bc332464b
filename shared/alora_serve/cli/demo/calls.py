"""What the demo asks beside the pipeline's own calls."""

from __future__ import annotations

from collections.abc import Sequence

from alora_serve.adapters.activation import no_activation, place_invocation
from alora_serve.cli.demo.result import Answer
from alora_serve.client import AdapterInfo, ChatMessage, Client, ModelInfo, PrefixHandle
from alora_serve.errors import AloraServeError
from alora_serve.types import TokenIds

_WARM_UP = (ChatMessage("system", "Answer in one word."), ChatMessage("user", "Name a colour."))
"""Shares no block with the conversation, not even the one of the template's own system turn."""


def warm_up(client: Client, intrinsics: Sequence[str]) -> None:
    """What a process does once in its life, such as reading adapters, is not what the demo measures.

    Raises:
        AloraServeError: a call failed.
    """
    client.generate(_WARM_UP, max_tokens=2).result()
    with client.run_intrinsics(_WARM_UP, intrinsics) as stream:
        for _, outcome in stream:
            if isinstance(outcome, AloraServeError):
                raise outcome


def free_answer(
    client: Client, conversation: PrefixHandle, adapter: AdapterInfo, model: ModelInfo, *, max_tokens: int
) -> Answer:
    """What an adapter says greedily of a conversation, bound to no schema, as PEFT is to none.

    Raises:
        AloraServeError: the call failed, or the prompt that we think was used has another length than the one that was.
    """
    # An answer's handle ends inside its turn; this one has all tokens that the adapter reads.
    handle = client.prefill(handle=conversation).handle if conversation.open_turn else conversation
    result = client.generate(handle=handle, adapter=adapter.name, max_tokens=max_tokens).result()
    prompt = _prompt(handle, adapter, model)
    if len(prompt) != result.usage.prompt_tokens:
        raise AloraServeError(f"the prompt has {result.usage.prompt_tokens} tokens, not {len(prompt)}")
    return Answer(adapter.name, result.text, result.token_ids, prompt)


def _prompt(handle: PrefixHandle, adapter: AdapterInfo, model: ModelInfo) -> TokenIds:
    """What a worker generates from: the handle's tokens and the suffix that the adapter's invocation asks for."""
    if not adapter.invocation_tokens:
        activation = no_activation(handle.generation_prompt_tokens)
    else:
        activation = place_invocation(
            kind=handle.kind,
            prefix_tokens=handle.prefix_tokens,
            generation_prompt_tokens=handle.generation_prompt_tokens,
            invocation_tokens=adapter.invocation_tokens,
            adapter_name=adapter.name,
            vocabulary_size=model.vocabulary_size,
        )
    return handle.prefix_tokens + activation.suffix_tokens
