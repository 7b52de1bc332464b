"""What clients send in the routing simulation: conversations of several turns that ask popular and rare adapters."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from adapter_router.affinity import adapter_key
from adapter_router.policy import Demand
from alora_serve.kv.fingerprints import STRIDE_TOKENS

MODEL_DIGEST = b"m" * 32


@dataclass(frozen=True)
class Traffic:
    """The shape of the load.

    Attributes:
        adapters: how many there are.
        zipf: exponent of their popularity; 1 is the classic.
        system_prompts: each shared by many conversations.
        system_tokens: of one, whole strides.
        first_tokens: mean of a conversation's first turn.
        turn_tokens: mean that each later turn adds.
        turns: mean number of them.
        think_seconds: mean time between a conversation's turns.
        fan_out: share of turns that ask ``fan_out_size`` adapters at once; of the rest ``base`` ask the base model.
    """

    adapters: int = 100
    zipf: float = 1.0
    system_prompts: int = 5
    system_tokens: int = 512
    first_tokens: int = 1024
    turn_tokens: int = 256
    turns: float = 5.0
    think_seconds: float = 3.0
    fan_out: float = 0.2
    fan_out_size: int = 5
    base: float = 0.3

    @property
    def requests_a_turn(self) -> float:
        """Mean number of sequences that a turn asks for."""
        return 1 + self.fan_out * (self.fan_out_size - 1)

    @property
    def mean_prefix_tokens(self) -> int:
        """Of a turn's conversation, about."""
        return int(self.system_tokens + self.first_tokens + self.turn_tokens * (self.turns - 1))

    @cached_property
    def popularity(self) -> list[float]:
        """Cumulative weights of adapters, most popular first."""
        return list(accumulate(1 / rank**self.zipf for rank in range(1, self.adapters + 1)))

    def draw_adapter(self, rng: random.Random) -> str:
        """One adapter's name by popularity."""
        return f"a{bisect_left(self.popularity, rng.random() * self.popularity[-1])}"


@dataclass(slots=True)
class Conversation:
    """One client's conversation; ``tokens`` grow by the turn."""

    number: int
    system: int
    system_tokens: int
    tokens: int

    @property
    def fingerprints(self) -> tuple[int, ...]:
        """As :class:`PrefixFingerprints` would give: equal for equal prefixes, else different."""
        shared = self.system_tokens // STRIDE_TOKENS
        own = range(shared, self.tokens // STRIDE_TOKENS)
        return (
            *((1 << 60) + (self.system << 16) + stride for stride in range(shared)),
            *((self.number << 16) + stride for stride in own),
        )


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate, as a worker sees it. ``turn`` numbers the turn it belongs to."""

    demand: Demand
    conversation: Conversation
    prefix_tokens: int
    answer_tokens: int
    turn: int
    sent: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What one client sends at one moment."""

    seconds: float
    conversation: Conversation
    adapters: tuple[str, ...]


def turns(traffic: Traffic, *, turns_a_second: float, seconds: float, rng: random.Random) -> Iterator[Turn]:
    """All turns until ``seconds``, unordered. Conversations begin at random, however the fleet is doing."""
    starts_a_second = turns_a_second / traffic.turns
    # Conversations that began before the simulation did are in full swing when it starts.
    now, number = -traffic.turns * traffic.think_seconds * 2, 0
    while (now := now + rng.expovariate(starts_a_second)) < seconds:
        number += 1
        tokens = traffic.system_tokens + 32 + int(rng.expovariate(1 / traffic.first_tokens))
        system, at = rng.randrange(traffic.system_prompts), now
        while at < seconds:
            if at >= 0:
                conversation = Conversation(number, system, traffic.system_tokens, min(tokens, 8192))
                yield Turn(at, conversation, _asked(traffic, rng))
            if rng.random() < 1 / traffic.turns:
                break
            tokens += 16 + int(rng.expovariate(1 / traffic.turn_tokens))
            at += rng.expovariate(1 / traffic.think_seconds)


def _asked(traffic: Traffic, rng: random.Random) -> tuple[str, ...]:
    if rng.random() < traffic.fan_out:
        return tuple(traffic.draw_adapter(rng) for _ in range(traffic.fan_out_size))
    return ("",) if rng.random() < traffic.base else (traffic.draw_adapter(rng),)


def requests(turn: Turn, number: int, *, answer_tokens: int) -> list[Request]:
    """The sequences of a turn, with the demands that a router would make of them."""
    conversation, size = turn.conversation, len(turn.adapters)
    near_conversation = b"tokens\0" + conversation.number.to_bytes(8, "little")
    fingerprints = conversation.fingerprints
    together: set[str] | None = set() if size > 1 else None
    made = []
    for placed, adapter in enumerate(turn.adapters):
        demand = Demand(
            adapter_key(adapter) if adapter and size == 1 else near_conversation,
            {MODEL_DIGEST},
            adapter,
            group_size=size - placed,
            together=together,
            fingerprints=fingerprints,
            prefix_tokens=conversation.tokens,
        )
        made.append(Request(demand, conversation, conversation.tokens, answer_tokens, number))
    return made
