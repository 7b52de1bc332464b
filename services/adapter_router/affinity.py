"""What a request should stay close to, and in which order endpoints are close to it: rendezvous hashing. Pure.

Every router replica, and the same one after a restart, orders the same endpoints the same way for the same key, without
any coordination. An endpoint that joins or leaves moves only the keys it wins or held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from alora_serve.types import ChatMessage, TokenIds

AFFINITY_TOKENS = 512
"""How many leading tokens name a conversation. A longer conversation keeps its key as it grows; a shorter one may move
between turns, which costs a fetch of fewer than 512 tokens."""

AFFINITY_CHARACTERS = 2048
"""The same of a text whose tokens are not known."""


def adapter_key(name: str) -> bytes:
    """The affinity key of an adapter: its weights stay in the memory of the worker this key prefers."""
    return b"adapter\0" + name.encode()


def conversation_key(prefix_tokens: TokenIds) -> bytes:
    """The affinity key of a conversation known by its tokens, the same for each later turn of it."""
    head = prefix_tokens[:AFFINITY_TOKENS]
    return b"tokens\0" + b"".join(token.to_bytes(4, "little") for token in head)


def opening_key(messages: Sequence[ChatMessage]) -> bytes:
    """The affinity key of a conversation not tokenized yet: its messages up to the first of the user."""
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        for text in (message.role, message.content):
            encoded = text.encode(errors="surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        if message.role == "user":
            break
    return b"opening\0" + digest.digest()


def text_key(text: str) -> bytes:
    """The affinity key of a complete prompt not tokenized yet: its beginning."""
    return b"text\0" + text[:AFFINITY_CHARACTERS].encode()


def rendezvous_weight(key: bytes) -> Callable[[str], tuple[bytes, str]]:
    """How close an address is to ``key``: the greater, the closer. A million addresses a second or so."""
    salt = hashlib.blake2b(key, digest_size=32).digest()

    def weight(address: str) -> tuple[bytes, str]:
        return hashlib.blake2b(address.encode(), key=salt, digest_size=16).digest(), address

    return weight


def rendezvous_order(key: bytes, addresses: Iterable[str]) -> list[str]:
    """``addresses``, closest to ``key`` first. Each order of endpoints is as likely as any other over all keys."""
    return sorted(addresses, key=rendezvous_weight(key), reverse=True)
