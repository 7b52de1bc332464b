"""Calls through the public API, timed where the user would time them: at the client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from alora_serve.adapters.activation import no_activation, place_invocation
from alora_serve.cli.demo.result import Answer, Row
from alora_serve.client import AdapterInfo, AsyncClient, ChatMessage, ModelInfo, PrefixHandle, TokenChunk
from alora_serve.errors import AloraServeError
from alora_serve.types import TokenIds


async def timed_prefill(client: AsyncClient, what: str, messages: Sequence[ChatMessage]) -> tuple[Row, PrefixHandle]:
    """Prefill a conversation; ``what`` names the row."""
    began = monotonic()
    result = await client.prefill(messages)
    return Row(what, monotonic() - began, result.usage), result.handle


async def timed_answer(
    client: AsyncClient,
    handle: PrefixHandle,
    *,
    adapter: AdapterInfo | None,
    model: ModelInfo,
    max_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Continue a prefilled conversation greedily; ``on_text`` is given the answer as it comes.

    Raises:
        AloraServeError: the prompt that we think was used has another length than the one that was.
    """
    name = adapter.name if adapter else ""
    began = monotonic()
    ttft_seconds = 0.0
    stream = client.generate(handle=handle, adapter=name, max_tokens=max_tokens)
    async for event in stream:
        if isinstance(event, TokenChunk):
            ttft_seconds = ttft_seconds or monotonic() - began
            on_text(event.text)
    result = await stream.result()
    prompt = _prompt(handle, adapter, model)
    if len(prompt) != result.usage.prompt_tokens:
        raise AloraServeError(f"the prompt has {result.usage.prompt_tokens} tokens, not {len(prompt)}")
    return Answer(name, result.text, result.token_ids, ttft_seconds, result.usage, prompt)


def _prompt(handle: PrefixHandle, adapter: AdapterInfo | None, model: ModelInfo) -> TokenIds:
    """What a worker generates from: the handle's tokens and the suffix that the adapter's invocation asks for."""
    if adapter is None or not adapter.invocation_tokens:
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
