"""Which endpoint a request goes to: rendezvous hashing with bounded load. Pure: no I/O, no clock, no randomness.

Every router replica, and the same one after a restart, orders the same endpoints the same way for the same key, so an
adapter keeps its worker without any coordination. An endpoint that joins or leaves moves only the keys it wins or held.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from alora_serve.types import AdapterInfo, ChatMessage, TokenIds

AFFINITY_TOKENS = 512
"""How many leading tokens name a conversation. A longer conversation keeps its key as it grows; a shorter one may move
between turns, which costs a fetch of fewer than 512 tokens."""


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """What is known of one endpoint at the moment of picking.

    Attributes:
        address: ``host:port``, the endpoint's identity.
        healthy: its status stream is alive and no call found it unreachable since.
        draining: it finishes what it has and takes nothing new.
        in_flight: requests this router has on it, counted from the moment each was picked.
        model_digest: of its last report; empty while it has not reported.
        adapters: by name, from its last report; never guessed from traffic.
    """

    address: str
    healthy: bool = True
    draining: bool = False
    in_flight: int = 0
    model_digest: bytes = b""
    adapters: Mapping[str, AdapterInfo] = field(default_factory=dict)

    def serves(self, adapter: str) -> bool:
        """It can run ``adapter``; the empty name is the base model, which every endpoint can run."""
        return not adapter or (adapter in self.adapters and not self.adapters[adapter].problem)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs of an endpoint.

    Attributes:
        key: what it should stay close to; see :func:`adapter_key` and :func:`conversation_key`.
        model_digests: base models that will do.
        adapter: name of the adapter; empty is the base model.
        group_size: requests of one fan-out still to be placed, this one included. The load bound counts them all, so a
            fan-out fills few endpoints up to their fair share instead of one request on each.
    """

    key: bytes
    model_digests: Collection[bytes]
    adapter: str = ""
    group_size: int = 1


@dataclass(frozen=True, slots=True)
class Pick:
    """The endpoint that takes a request. ``preferred``: its first choice, not one that another's load sent it to."""

    address: str
    preferred: bool


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


def rendezvous_order(key: bytes, addresses: Iterable[str]) -> list[str]:
    """``addresses`` by falling weight for ``key``. Each order of endpoints is as likely as any other over all keys."""
    salt = hashlib.blake2b(key, digest_size=32).digest()

    def weight(address: str) -> tuple[bytes, str]:
        return hashlib.blake2b(address.encode(), key=salt, digest_size=16).digest(), address

    return sorted(addresses, key=weight, reverse=True)


def load_bound(total_in_flight: int, num_endpoints: int, load_factor: float, group_size: int = 1) -> int:
    """Most requests one endpoint may hold once ``group_size`` more are placed: the fair share times the factor."""
    return math.ceil(load_factor * (total_in_flight + group_size) / num_endpoints)


def eligible(endpoints: Iterable[EndpointSnapshot], demand: Demand) -> list[EndpointSnapshot]:
    """The endpoints that may take a request now, whatever their load."""
    return [
        endpoint
        for endpoint in endpoints
        if endpoint.healthy
        and not endpoint.draining
        and endpoint.model_digest in demand.model_digests
        and endpoint.serves(demand.adapter)
    ]


def pick(
    endpoints: Iterable[EndpointSnapshot], demand: Demand, *, load_factor: float, avoid: Collection[str] = ()
) -> Pick | None:
    """Where the next request goes, or None when no endpoint may take it.

    The first in rendezvous order that stays within the load bound. With ``load_factor`` >= 1 there always is one: were
    all at the bound, they would hold more requests than there are.

    Args:
        endpoints: everything known.
        demand: what the request needs.
        load_factor: how far above its fair share an endpoint may be filled, >= 1.
        avoid: addresses that failed this request already.
    """
    candidates = {e.address: e.in_flight for e in eligible(endpoints, demand) if e.address not in avoid}
    if not candidates:
        return None
    bound = load_bound(sum(candidates.values()), len(candidates), load_factor, demand.group_size)
    ranked = rendezvous_order(demand.key, candidates)
    address = next(address for address in ranked if candidates[address] < bound)
    return Pick(address, preferred=address == ranked[0])
