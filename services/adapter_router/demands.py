"""What each kind of call needs of an endpoint: a model, what it should stay close to, what it may have to wait for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from adapter_router.affinity import adapter_key, conversation_key, opening_key, text_key
from adapter_router.policy import Demand
from alora_serve.kv.fingerprints import PrefixFingerprints
from alora_serve.kv.tenancy import NO_TENANT
from alora_serve.types import AdapterInfo, PrefixHandle, Prompt

_BYTES_A_TOKEN: Final = 4
"""Of UTF-8, about, in most languages and tokenizers."""


class Demands:
    """Makes the demands of calls."""

    def __init__(self, fingerprints: PrefixFingerprints) -> None:
        """Keep how services name the prefixes in their memory."""
        self._fingerprints = fingerprints

    def generation(self, handle: PrefixHandle, adapter: AdapterInfo | None, tenant_salt: bytes = NO_TENANT) -> Demand:
        """One generation: close to its adapter's weights, or for the base model to its conversation's KV."""
        key = adapter_key(adapter.name) if adapter else conversation_key(handle.prefix_tokens)
        return self._on_prefix(key, handle, adapter, tenant_salt)

    def fan_out(
        self, handle: PrefixHandle, adapters: Sequence[AdapterInfo | None], tenant_salt: bytes = NO_TENANT
    ) -> list[Demand]:
        """A generation for each of ``adapters``, in the order of placing them: all close to the conversation's KV."""
        key, together = conversation_key(handle.prefix_tokens), set[str]()
        first = self._on_prefix(key, handle, None, tenant_salt)
        return [
            replace(
                self._own_tokens(first, handle) if is_plain_lora(adapter) else first,
                adapter=adapter.name if adapter else "",
                group_size=len(adapters) - placed,
                together=together,
            )
            for placed, adapter in enumerate(adapters)
        ]

    def prefill(self, prompt: Prompt, models: Collection[bytes], tenant_salt: bytes = NO_TENANT) -> Demand:
        """A prefill: close to the conversation, which is known by a handle's tokens only from its second turn on."""
        expected = _new_tokens(prompt)
        if prompt.handle is not None:
            key = conversation_key(prompt.handle.prefix_tokens)
            return replace(self._on_prefix(key, prompt.handle, None, tenant_salt), expected_tokens=expected)
        if prompt.messages:
            return Demand(opening_key(prompt.messages), models, expected_tokens=expected)
        key = text_key(prompt.text) if prompt.text else conversation_key(prompt.token_ids)
        return Demand(key, models, expected_tokens=expected)

    def _on_prefix(self, key: bytes, handle: PrefixHandle, adapter: AdapterInfo | None, tenant_salt: bytes) -> Demand:
        demand = Demand(
            key,
            {handle.model_digest},
            adapter.name if adapter else "",
            fingerprints=self._fingerprints.of(
                handle.prefix_tokens, model_digest=handle.model_digest, tenant_salt=tenant_salt
            ),
            prefix_tokens=len(handle.prefix_tokens),
        )
        return self._own_tokens(demand, handle) if is_plain_lora(adapter) else demand

    @staticmethod
    def _own_tokens(demand: Demand, handle: PrefixHandle) -> Demand:
        """For what no base KV is any good: every token is computed."""
        return replace(demand, fingerprints=(), prefix_tokens=0, computed_tokens=len(handle.prefix_tokens))


def is_plain_lora(adapter: AdapterInfo | None) -> bool:
    """It changes every token's KV, so that base KV is of no use to it."""
    return adapter is not None and adapter.kind == "lora"


def _new_tokens(prompt: Prompt) -> int:
    """About how many tokens a base prefill has to run. What comes before the last answer was prefilled to get that."""
    if prompt.token_ids:
        return len(prompt.token_ids)
    last_answer = max((turn for turn, message in enumerate(prompt.messages) if message.role == "assistant"), default=0)
    texts = [prompt.text, *(message.content for message in prompt.messages[last_answer:])]
    if not last_answer:
        texts += [document.text for document in prompt.documents]
    return sum(len(text.encode(errors="surrogatepass")) for text in texts) // _BYTES_A_TOKEN
